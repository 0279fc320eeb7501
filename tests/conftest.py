"""Shared fixtures: genuine tiny models with random weights, made once a session."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import pipelines
import reward_scorers
import t2i_align.testbed.scorer  # noqa: F401  (registers the oracles, before any test could be the first to do it)
from t2i_align import objectives, plugins
from t2i_align.data import readers
from tests.tiny import TINY

# The suite draws the same examples every time, so that it passes or fails for the code alone; `make fuzz` draws others.
settings.register_profile("same", derandomize=True)
settings.register_profile("others", derandomize=False)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tiny tensors gain nothing from threads, and the suite runs in several processes.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _signals_are_heard() -> None:
    # Under `nohup` or in the background of a script they are ignored, which the processes that tests start inherit.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """What a test registers is gone after it, and so is any module that a plugin was run as."""
    tables: list[dict[str, Any]] = [
        objectives.CLASSES, pipelines.FAMILIES, reward_scorers.registry.FACTORIES, readers.READERS, plugins.FILES,
    ]  # fmt: skip
    before = [dict(table) for table in tables]
    yield
    for name in {*plugins.FILES, "margin_helper"} & set(sys.modules):
        del sys.modules[name]
    for table, content in zip(tables, before, strict=True):
        for name in set(table) - set(content):
            del table[name]


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the checkpoint with this name in TINY, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: TINY[name](folder / name))


@pytest.fixture(scope="session")
def sd_path(path: Callable[[str], Path]) -> Path:
    """A random-weight Stable Diffusion folder, epsilon-prediction, 32 px, VAE factor 2."""
    return path("sd")


@pytest.fixture(scope="session")
def sd_v_path(path: Callable[[str], Path]) -> Path:
    """The same with v-prediction."""
    return path("sd-v")
