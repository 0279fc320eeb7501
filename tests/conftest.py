"""Shared fixtures: genuine tiny models with random weights, made once a session."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
