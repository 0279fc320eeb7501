"""What a traced step is given in place of data, scorer and encoders' weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipelines import TrainablePipeline
from pipelines.blank import blank_component
from t2i_align.config import RunConfig
from t2i_align.data.batch import Batch, Conditioning
from t2i_align.data.schema import COLUMNS
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.inference.models import resolve_model
from t2i_align.inference.options import PRECISIONS
from t2i_align.planning.published import components


class Even(SampleRNG):
    """Random numbers without values, but for what decides the course of a step: there each choice is as frequent.

    So a batch takes about as many steps of inversion, and of a sampler with gradients, as one does on average.
    """

    deciding = staticmethod(unset_fake_temporarily)

    def choice(self, name: str, count: int) -> list[int]:
        rows = len(self.keys)
        return [(2 * row + 1) * count // (2 * rows) for row in range(rows)]


class Brightness:
    """In place of a scorer, whose network a plan does not open: the mean of an image's pixels."""

    def judge(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        return pixels.flatten(1).mean(1), {}


def blank_encoders(config: RunConfig, pipeline: TrainablePipeline) -> dict[str, nn.Module]:
    """VAE and text encoders by name, without weights, in the precision of the run."""
    folder, half = resolve_model(config.model.path), PRECISIONS[config.train.precision] != torch.float32
    blank = {}
    for name, entry in components(Path(folder)).items():
        if name in type(pipeline).encoder_names:
            kind = torch.bfloat16 if half and name in pipeline.large_encoders else torch.float32
            blank[name] = blank_component(folder, name, entry, kind).requires_grad_(False)
    return blank


def first_batch(config: RunConfig, pipeline: TrainablePipeline, k: int) -> tuple[Batch, SampleRNG]:
    """A micro-batch of the run's shapes, and its random numbers."""
    train, needs, count = config.train, config.objective.needs, config.train.batch_size
    height, width = config.data.size or pipeline.default_size
    shape = pipeline.latent_shape(height, width, config.data.frames or pipeline.default_frames)
    texts = pipeline.text_shapes()
    if config.model.segments:
        texts["prompt_embeds"] = (config.model.segments.tokens, *texts["prompt_embeds"][1:])

    def conditioning(*leading: int) -> Conditioning:
        out = {name: torch.zeros(*leading, *shape) for name, shape in texts.items()}
        masks = {mask: (*leading, texts[name][0]) for name, mask in pipeline.conditioning_masks.items()}
        return out | {mask: torch.ones(shape, dtype=torch.bool) for mask, shape in masks.items()}

    columns: dict[str, Any] = {}
    for name in needs.columns:
        if name in COLUMNS:
            column = COLUMNS[name]
            leading = (count, k) if column.per_candidate else (count,)
            if column.per_segment:  # of each latent frame; the first candidate is the better one
                columns[name] = torch.linspace(1, 0, k)[:, None].expand(count, k, shape[1])
            else:
                columns[name] = conditioning(*leading) if column.text else ("",) * count
    keys = tuple(f"0/{i}" for i in range(count))
    batch = Batch(
        keys=keys,
        latents=torch.zeros(count, k, *shape),
        scores=torch.linspace(1, 0, k).expand(count, k) if k > 1 else torch.ones(count, 1),
        conditioning=conditioning(count),
        columns=columns,
        sizes=torch.zeros(count, k, 6) if pipeline.size_conditioned else None,
        empty=conditioning(1),
    )
    return batch, Even(train.seed, keys, pipeline.process, train.timestep_sampling)
