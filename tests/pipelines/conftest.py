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
from tests.tiny import TINY

PathOf = Callable[[str], Path]  # name in TINY -> folder
Load = Callable[[str], TrainablePipeline]


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> PathOf:
    """The folder of the tiny checkpoint with this name."""
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: TINY[name](folder / name))


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
