"""Every tiny checkpoint, written once and loaded once per module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import pipelines
from pipelines import TrainablePipeline
from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data.loader import PreferenceDataset, open_dataset
from t2i_align.data.schema import Batch
from t2i_align.objectives.base import Requirements

PathOf = Callable[[str], Path]  # name in tests.tiny.TINY -> folder
Load = Callable[[str], TrainablePipeline]
PAIRS = Requirements(candidates=2)


def opened(
    folder: Path, data: Path, pipeline: Any, size: tuple[int, int], frames: int | None = None,
    needs: Requirements = PAIRS, **options: Any,
) -> PreferenceDataset:  # fmt: skip
    """Preference data encoded by a stand-in for a family, or on the fly with cache=False."""
    return open_dataset(
        DataConfig(path=str(data), **options), ModelConfig(), needs=needs, pipeline=lambda: pipeline, size=size,
        frames=frames, encoder_fingerprint=lambda: type(pipeline).__name__, cache_root=folder / "cache", progress=False,
    )  # fmt: skip


def first_batch(source: PreferenceDataset, batch_size: int) -> Batch:
    loader = source.loader(seed=0, start_step=0, batch_size=batch_size, accumulate=1, rank=0, world=1, workers=0)
    return source.to_batch(next(islice(loader, 1)), torch.device("cpu"))


@pytest.fixture(scope="module")
def shared(path: PathOf) -> Load:
    """That checkpoint loaded, for tests that do not change it."""
    return cache(lambda name: pipelines.load(path(name)))


@pytest.fixture
def fresh(shared: Load) -> Load:
    """A copy for tests that change it."""
    return lambda name: copy.deepcopy(shared(name))


@pytest.fixture(scope="module")
def plain(path: PathOf) -> Callable[[str], Any]:
    """That checkpoint in plain diffusers."""

    def load(name: str) -> Any:
        without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-no-t5" else {}
        pipe = DiffusionPipeline.from_pretrained(str(path(name)), **without)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return cache(load)
