"""What a test registers is gone after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

import pipelines
import reward_scorers
from t2i_align import objectives, plugins
from t2i_align.data import readers


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """The tables as they were, and no module that a plugin was run as."""
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
