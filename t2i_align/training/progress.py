"""What a run tells while it trains: a bar or plain lines, and the same lines in its run.log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from t2i_align.utils.progress import interactive

LOG_FILE = "run.log"
SHOWN = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "accuracy": "accuracy"}
MEASURED = ("time", "seconds_per_step", "memory_gib")  # what differs between two runs that are otherwise equal


class Progress:
    """Of a run in a folder. shown: on the console as well. passes: over the data with each step, if that is known."""

    def __init__(self, folder: Path, first: int, steps: int, passes: float | None, *, shown: bool) -> None:
        self.folder, self.steps, self.passes, self.shown = folder, steps, passes, shown
        self.bar = tqdm(initial=first, total=steps, desc="train", disable=not (shown and interactive()))
        self.since = (first, time.monotonic())

    def measured(self, step: int, device: torch.device) -> dict[str, float]:
        """What belongs to a line of metrics: Unix time, seconds a step since the line before, peak memory, passes."""
        (before, then), now = self.since, time.monotonic()
        self.since = (step, now)
        out = {
            "time": round(time.time(), 3),
            "seconds_per_step": round((now - then) / max(1, step - before), 4),
            "memory_gib": round(memory(device) / 2**30, 3),
        }
        return out if self.passes is None else {**out, "epoch": step * self.passes}

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a logged step, or what was found after it."""
        if "loss" not in metrics:
            short = {f"held_out/{name}": f"held-out {label}" for name, label in (("loss", "loss"), *SHOWN.items())}
            shown = {short.get(name, name): value for name, value in metrics.items()}
            parts = (f"{name} {value:.4g}" for name, value in shown.items() if not name.startswith("held_out/"))
            return self.say(f"step {step}: {', '.join(parts)}")
        texts = [f"loss {metrics['loss']:.4f}"]
        texts += [f"{short} {metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics]
        texts += [f"lr {metrics['lr']:.2g}"]
        texts += [f"passes {metrics['epoch']:.3g}"] if "epoch" in metrics else []
        texts += [f"{metrics['memory_gib']:.1f} GiB"]
        self.bar.set_postfix_str(", ".join(texts))
        speed = metrics["seconds_per_step"]
        texts += [f"{speed:.3g} s/step", f"{tqdm.format_interval((self.steps - step) * speed)} left"]
        self.say(f"step {step}/{self.steps}: {', '.join(texts)}", bar=True)

    def say(self, text: str, *, bar: bool = False) -> None:
        """Write a line to the log and the console. bar: what the bar shows as well."""
        write(self.folder, text)
        if self.shown and not (bar and interactive()):
            tqdm.write(text)

    def start(self, step: int) -> None:
        """Time is measured from here on: before the first step, samples of the initial model may be drawn."""
        self.since = (step, time.monotonic())

    def go_to(self, step: int) -> None:
        """The run is at this step."""
        self.bar.update(step - self.bar.n)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Warnings go to the log as well inside the block, and the bar is closed after it."""
        handler = logging.FileHandler(self.folder / LOG_FILE, encoding="utf-8")
        handler.setLevel(logging.WARNING)
        logging.getLogger("t2i_align").addHandler(handler)
        try:
            with self.bar:
                yield
        finally:
            logging.getLogger("t2i_align").removeHandler(handler)
            handler.close()


def write(folder: Path, text: str) -> None:
    """Append lines to a run's log."""
    with open(folder / LOG_FILE, "a", encoding="utf-8") as stream:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")


def memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings by their dotted keys, as trackers take them."""
    out: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return out
