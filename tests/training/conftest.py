"""The data that most tests of training use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import jsonl_pairs


@pytest.fixture(scope="package")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of twelve pairs."""
    return jsonl_pairs(tmp_path_factory.mktemp("pairs"))
