"""Drawing samples of several models for the same prompts and seeds, with progress, cancellation and scores."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from t2i_align.demo.media import MediaFolder
from t2i_align.errors import UserError, unknown
from t2i_align.inference.generate import TOTAL, judge, sample
from t2i_align.inference.models import LORA_FILE, Aligned, adapter_on, load_pipeline, resolve_aligned, resolve_base
from t2i_align.inference.options import build_scorers, check_options, pick_device, unscorable
from t2i_align.inference.users import Served, user_on

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from reward_scorers import Scorer
    from t2i_align.config import ModelConfig

BASE = "base"
UNNAMED = ("run", "lora", "model", LORA_FILE)  # parts of a path that do not tell models apart
KEPT = 2  # whole models that stay loaded


class Cancelled(Exception):
    """A job was cancelled."""


@dataclass
class Job:
    """A drawing under way. done, total: calls of the denoiser. note: what it is at. stopped: it ended before all."""

    total: int = 1
    done: int = 0
    note: str = "waiting for the model"
    stopped: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)

    def step(self, *_: Any) -> None:
        """Count a call of the denoiser; raises Cancelled if the job is."""
        if self.cancelled.is_set():
            raise Cancelled
        self.done += 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model that can be drawn: the base alone, a LoRA or soft tokens on it, or another whole model."""

    name: str
    config: ModelConfig
    adapter: Aligned | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A sample. file: its name in the folder. scores: by scorer, without those that cannot judge the prompt."""

    model: str
    weight: float
    prompt: str
    seed: int
    file: str
    scores: Mapping[str, float] = field(default_factory=dict)


class Studio:
    """Models by name, of which one draws at a time.

    Args:
        base: diffusers folder, single file, Hub id or `testbed:sd`.
        models: LoRAs, training runs or whole models to compare with it.
        scorers: specs of scorers.
        options: of `generate.sample`: batch_size, height, width, frames.

    Raises:
        UserError: any of them is not there or cannot be used.
    """

    def __init__(
        self,
        base: str | Path,
        models: Sequence[str | Path] = (),
        scorers: Sequence[str | Scorer] = (),
        *,
        precision: str = "fp32",
        device: str | None = None,
        **options: Any,
    ) -> None:
        check_options(precision, **options)
        self.precision, self.device, self.options = precision, pick_device(device), options
        self.base = resolve_base(base)
        self.entries: dict[str, Entry] = {BASE: Entry(name=BASE, config=self.base)}
        for path in models:
            self.add(path)
        self.scorers = [scorer.to(self.device) for scorer in build_scorers(list(scorers))] if scorers else []
        self._loaded: OrderedDict[ModelConfig, TrainablePipeline] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, path: str | Path, name: str | None = None) -> str:
        """Add a LoRA, a run or a whole model; returns its name, by default the end of its path."""
        aligned = resolve_aligned(path)
        parts = [part for part in Path(path).expanduser().absolute().parts if part not in UNNAMED]
        stem = name or Path(parts[-1]).stem
        unique = next(n for i in range(1, 1000) if (n := f"{stem} {i}" if i > 1 else stem) not in self.entries)
        whole = aligned.kind == "model"
        config = resolve_base(aligned.path) if whole else resolve_base(self.base.path, aligned)
        self.entries[unique] = Entry(name=unique, config=config, adapter=None if whole else aligned)
        return unique

    def pipeline(self, config: ModelConfig) -> TrainablePipeline:
        """A model, loaded if it is not."""
        if config not in self._loaded:
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
            self._loaded[config] = load_pipeline(config, self.precision, self.device)
        self._loaded.move_to_end(config)
        return self._loaded[config]

    def draw(
        self,
        weights: Mapping[str, float],
        rows: Sequence[tuple[str, int]],
        folder: MediaFolder,
        job: Job,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        served: Served | None = None,
    ) -> Iterator[list[Drawn]]:
        """The samples of each model in turn, batch by batch.

        Args:
            weights: strength of each model's LoRA, by the models' names; of others without effect.
            rows: prompts and seeds, which all models share.
            folder: where the samples are put.
            served: whom models with a personal branch draw for.

        Raises:
            Cancelled: the job was. UserError, PipelineError: a model or option that cannot be used.
        """
        for name in weights:
            if name not in self.entries:
                raise unknown("model", name, self.entries)
        if not weights or not rows:
            raise UserError("nothing to draw: at least one model and one prompt are needed")
        with self._lock:
            job.step()
            for place, (name, weight) in enumerate(weights.items()):
                entry = self.entries[name]
                job.note = f"loading {name}"
                pipeline = self.pipeline(entry.config)
                taken, guided, size = pipeline.sampling(steps, guidance, self.options.get("batch_size"))
                batches = [rows[start : start + size] for start in range(0, len(rows), size)]
                job.total, job.done = len(weights) * len(batches) * taken, place * len(batches) * taken
                job.note = f"drawing {name}"
                options = {**self.options, "batch_size": size, "steps": taken, "guidance": guided}
                person = user_on(pipeline, served, guided)
                with adapter_on(pipeline, entry.adapter, weight), person, _watched(pipeline.denoiser, job):
                    for batch in batches:
                        yield self._batch(pipeline, name, weight, batch, folder, options)

    def _batch(
        self,
        pipeline: TrainablePipeline,
        name: str,
        weight: float,
        rows: Sequence[tuple[str, int]],
        folder: MediaFolder,
        options: Mapping[str, Any],
    ) -> list[Drawn]:
        prompts, seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
        samples = sample(pipeline, prompts, seeds, **options)
        scores: list[dict[str, float]] = [{} for _ in rows]
        for scorer in self.scorers:
            able = [place for place, prompt in enumerate(prompts) if not unscorable([scorer], prompt)]
            for place, values in judge(scorer, [samples[i] for i in able], [prompts[i] for i in able]) if able else ():
                scores[able[place]][scorer.name] = values[TOTAL]
        return [
            Drawn(model=name, weight=weight, prompt=prompt, seed=seed, file=folder.add(one, pipeline.fps), scores=own)
            for (prompt, seed), one, own in zip(rows, samples, scores, strict=True)
        ]


@contextmanager
def _watched(denoiser: nn.Module, job: Job) -> Iterator[None]:
    """Count the denoiser's calls, at any of which the job can be cancelled, whatever the sampler is."""
    hook = denoiser.register_forward_pre_hook(job.step)
    try:
        yield
    finally:
        hook.remove()
