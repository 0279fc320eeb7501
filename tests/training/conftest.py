"""The data that most tests of training use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import image, jsonl_pairs

CANDIDATES = 3


@pytest.fixture(scope="package")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of twelve pairs."""
    return jsonl_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="package")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of three with graded scores, captions and a wrong caption: all columns that an objective can require."""
    folder = tmp_path_factory.mktemp("rankings")
    lines: list[dict[str, Any]] = []
    for i in range(8):
        names = [f"{i}_{k}.png" for k in range(CANDIDATES)]
        for k, name in enumerate(names):
            image(CANDIDATES * i + k).save(folder / name)
        lines.append({
            "prompt": f"prompt {i}", "images": names, "scores": [0.2 + 0.01 * i, 0.9, 0.5],
            "captions": [f"caption {i} {k}" for k in range(CANDIDATES)], "negative_caption": f"wrong {i}",
            "segment_scores": [[0.0], [1.0], [i % 2]], "segment_seconds": 1.0,
        })  # fmt: skip
    file = folder / "rankings.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
