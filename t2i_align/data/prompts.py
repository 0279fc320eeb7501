"""Prompts alone, for objectives that learn from a scorer: from a list of them, or those of preference data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from t2i_align.data import readers
from t2i_align.data.batch import Batch, Conditioning
from t2i_align.data.loader import Item, PreferenceDataset, steps, widened
from t2i_align.data.opening import Survey
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from t2i_align.inference.options import resolve_prompts

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline
    from t2i_align.config import DataConfig
    from t2i_align.objectives.base import Requirements


class PromptDataset(PreferenceDataset):
    """Distinct prompts, encoded batch by batch; a group has one candidate, of zeros, that gives the latents' shape."""

    def __init__(
        self, prompts: Sequence[str], pipeline: TrainablePipeline, needs: Requirements, size: tuple[int, ...]
    ) -> None:
        content = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        super().__init__(
            needs,
            counts={"groups": len(prompts), "skipped": 0},
            score_range=(0.0, 0.0),
            fingerprint={"prompts": content},
        )
        self.prompts, self.pipeline = prompts, pipeline
        height, width, *frames = size
        self.shape = pipeline.encode_pixels(torch.zeros(1, *frames, 3, height, width)).shape[1:]

    def steps(self, *, seed: int, size: int, start: int) -> Iterator[list[Any]]:
        return steps(np.arange(len(self.prompts)), seed=seed, size=size, start=start)

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> Item:
        prompts = [self.prompts[number] for _, number in positions]
        return {"keys": [f"{epoch}/{number}" for epoch, number in positions], "prompts": prompts}

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        count = len(item["keys"])
        return Batch(
            keys=tuple(item["keys"]),
            latents=torch.zeros(count, 1, *self.shape, device=device),
            scores=torch.zeros(count, 1, device=device),
            conditioning=widened(dict(self.pipeline.encode_prompts(item["prompts"])), device),
            prompts=tuple(item["prompts"]),
        )

    def some_prompts(self, count: int) -> list[str]:
        return list(self.prompts[:count])

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        conditioning: Conditioning = widened(dict(self.pipeline.encode_prompts([""])), device)
        return conditioning

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pipeline": None}  # workers name prompts; they are encoded here


def open_prompts(data: DataConfig) -> list[str]:
    """The distinct prompts of a text file, `testbed:train` and the like, or of a source of preferences, in its order.

    Raises:
        UserError: nothing there, or no prompt in it.
    """
    path = Path(data.path)
    if data.path != "testbed:pairs" and (data.path.startswith("testbed:") or path.suffix == ".txt"):
        found = resolve_prompts(data.path)
    else:
        source = readers.resolve(data.path)
        items, survey = list(readers.read(source, readers.detect(source, data.format), images=False)), Survey()
        for item in items:
            survey.add(item)
        survey.check_usable(data.path)
        found = [
            item.prompt for item in items if isinstance(item, Group)
        ]  # not captions, which may be wrong on purpose
    prompts = list(dict.fromkeys(found))[: data.limit]
    if not prompts:
        raise UserError(f"{data.path}: no prompt in it")
    return prompts
