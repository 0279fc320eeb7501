"""A training run on the votes, in a process of its own, so that voting and drawing go on beside it.

FOLDER/votes_N.jsonl   the votes that run N learns from; those that are cast meanwhile are for the next one
       runs/N/         the run, with runs/N.yaml, its configuration, and runs/N.log, what it printed
       loras/N.safetensors   its LoRA with the tensor names of other tools, once somebody wants it
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from t2i_align import config as configuration
from t2i_align import objectives
from t2i_align.demo.votes import Votes
from t2i_align.errors import UserError
from t2i_align.inference.export import export_lora
from t2i_align.inference.models import resolve_aligned
from t2i_align.quickstart import CONFIG
from t2i_align.training.loop import METRICS_FILE
from t2i_align.utils.files import json_lines, read_bytes, whole_lines, write_text

RUNS, LORAS = "runs", "loras"
MAX_STEPS, LOGGED = 10_000, 20  # of a run: steps at most, and lines in its curve at least
FEWEST = 2  # votes that prefer one of two
STOP_SECONDS = 60  # to finish a step and save it


@dataclass(frozen=True, kw_only=True)
class State:
    """A run as it is. history: its logged metrics. weights: of a LoRA that can be drawn with. message: for people."""

    number: int
    running: bool
    steps: int
    message: str
    history: Sequence[Mapping[str, Any]] = field(default_factory=list)
    weights: Path | None = None


class Training:
    """Runs one after the other.

    Args:
        base: what is trained on.
        config: configuration whose values a run starts from (default: the quickstart's for a bundled model, else the
            defaults).
    """

    def __init__(self, votes: Votes, base: str, config: str | Path | None = None) -> None:
        if config is None:
            config = CONFIG if base.startswith("testbed:") else None
        start: dict[str, Any] = {"model": {"path": base}} | ({} if config else {"objective": "diffusion_dpo"})
        self.votes, self.folder = votes, votes.folder / RUNS
        self.config = configuration.changed(config, {**start, "output_dir": str(self.folder)}, [])
        self._process: subprocess.Popen[bytes] | None = None
        self._number = self._steps = 0
        self._lock = threading.Lock()

    def start(
        self,
        objective: str | None = None,
        *,
        steps: int | None = None,
        lr: float | None = None,
        user: str | None = None,
    ) -> None:
        """Start a run.

        Args:
            objective: one of `choices()`. steps, lr: of the optimiser (default: the configuration's, as the objective).
            user: learn from this user's votes alone.

        Raises:
            UserError: a run is going on, too few votes, or a value that cannot be used.
        """
        with self._lock:
            if self._running:
                raise UserError(f"run {self._number} is going on; wait for it or stop it")
            rows = [row for row in self.votes.snapshot() if user is None or row.get("user") == user]
            decided = sum(row["vote"] in ("left", "right") for row in rows)
            if decided < FEWEST:
                raise UserError(f"{decided} votes prefer one of two so far; a run needs at least {FEWEST}")
            given: dict[str, Any] = {"train.steps": steps, "optim.lr": lr}
            if objective not in (None, self.config.objective.name):
                if objective not in choices():
                    raise UserError(f"objective {objective!r}: votes suit {', '.join(choices())}")
                given["objective"] = objective
            overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
            run = configuration.changed(self.config, {}, overrides)
            if run.train.steps > MAX_STEPS:
                raise UserError(f"steps must be at most {MAX_STEPS}, found {run.train.steps}")
            number = 1 + max((int(path.stem) for path in self.folder.glob("*.yaml") if path.stem.isdigit()), default=0)
            data = self.votes.folder / f"votes_{number}.jsonl"
            values = configuration.to_mapping(run)
            values["output_dir"] = str(self.folder / str(number))
            values["data"] |= {"path": str(data), "cache_dir": str(self.folder / "cache")}
            values["train"]["batch_size"] = min(run.train.batch_size, decided)
            values["log"]["every"] = max(1, min(run.log.every, run.train.steps // LOGGED))
            values["log"]["checkpoint_every"] = min(run.log.checkpoint_every, run.train.steps)
            write_text(data, json_lines(rows))
            write_text(self.folder / f"{number}.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
            self._number, self._steps = number, run.train.steps
            self._process = self._launch(number)

    def stop(self, wait: float = 0) -> None:
        """Have the run finish its step and save it, as Ctrl-C does; `wait` so many seconds for that, then end it."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGINT)
        if wait:
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.kill()

    def state(self) -> State | None:
        """The newest run of this demo; None before the first."""
        process, number = self._process, self._number
        if process is None:
            return None
        code, run = process.poll(), self.folder / str(number)
        history = whole_lines(run / METRICS_FILE, repair=False)
        weights = None if code is None else _weights(run)
        done = next((line["step"] for line in reversed(history) if "loss" in line), 0)
        if code is None:
            message = f"run {number}: step {done} of {self._steps}" if history else f"run {number}: preparing"
        elif code == 0:
            message = f"run {number} has finished: {weights}"
        else:
            log = read_bytes(self.folder / f"{number}.log").decode(errors="replace").replace("\r", "\n")
            last = next((line for line in reversed(log.splitlines()) if line.strip()), f"exit status {code}")
            message = f"run {number} was stopped after step {done}" if code == 130 else f"run {number} failed: {last}"
        return State(
            number=number, running=code is None, steps=self._steps, message=message, history=history, weights=weights
        )

    def export(self) -> Path:
        """The newest run's LoRA as one file, with ComfyUI's and A1111's tensor names where the family has them.

        Raises:
            UserError: there is no LoRA yet.
        """
        state = self.state()
        if state is None or state.weights is None:
            raise UserError("no run of this demo has left a LoRA yet")
        out = self.votes.folder / LORAS / f"{state.number}.safetensors"
        return out if out.is_file() else export_lora(self.folder / str(state.number), out)

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _launch(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "t2i_align", "train", str(self.folder / f"{number}.yaml")]
        root = str(Path(configuration.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with open(self.folder / f"{number}.log", "wb") as log:
            # A session of its own: Ctrl-C in the demo's terminal reaches the demo, which then stops the run.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip


def choices() -> list[str]:
    """The objectives that learn from votes alone: of pairs, without captions, scores or a scorer."""
    needs = {name: objectives.get(name).needs for name in sorted(objectives.CLASSES)}
    return [name for name, need in needs.items() if need.candidates <= 2 and not (need.columns or need.scorer)]


def _weights(run: Path) -> Path | None:
    """What a run that has ended left to draw with."""
    try:
        return Path(resolve_aligned(run).path)
    except UserError:
        return None
