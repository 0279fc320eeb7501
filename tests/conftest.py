"""Shared fixtures: genuine tiny models with random weights, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_sd


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tiny tensors gain nothing from threads, and the suite runs in several processes.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Stable Diffusion folder, epsilon-prediction, 32 px, VAE factor 2."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sd_v_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v-prediction."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd-v", prediction_type="v_prediction")
