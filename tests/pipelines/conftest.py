"""Every tiny checkpoint, written once and loaded once per module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import pipelines
from pipelines import TrainablePipeline
from t2i_align.data.batch import Batch
from t2i_align.data.loader import PreferenceDataset
from t2i_align.objectives.base import Requirements
from tests.data import test_loader

PathOf = Callable[[str], Path]  # name in tests.tiny.TINY -> folder
Load = Callable[[str], TrainablePipeline]
PAIRS = Requirements(candidates=2)


def opened(
    folder: Path, data: Path, pipeline: Any, size: tuple[int, int], frames: int | None = None, **options: Any
) -> PreferenceDataset:
    """Preference data encoded by a stand-in for a family, or on the fly with cache=False."""
    how = {"needs": PAIRS, "pipeline": lambda: pipeline, "encoders": type(pipeline).__name__, "frames": frames}
    return test_loader.opened(folder, data, size=size, **how | options)


def first_batch(source: PreferenceDataset, batch_size: int) -> Batch:
    return test_loader.batches(source, 1, batch_size)[0]


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
