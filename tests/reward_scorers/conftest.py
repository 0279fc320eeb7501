from __future__ import annotations

from pathlib import Path

import pytest

from reward_scorers import Scorer
from tests.reward_scorers.small import small_scorers


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the weights of `scorers` are."""
    return tmp_path_factory.mktemp("scorers")


@pytest.fixture(scope="package")
def scorers(folder: Path) -> dict[str, Scorer]:
    return small_scorers(folder)
