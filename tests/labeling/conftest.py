"""Sources to label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_align.testbed.captions import corrupt, describe, draw_for, write
from t2i_align.testbed.scenes import degrade, render, sample_scene, to_uint8
from t2i_align.utils.files import append_line, whole_lines

GROUPS = 11


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Pairs of drawn scenes: the caption's and one with a fault; every third has the better one second, one is a tie.

    Group 5's second image is damaged.
    """
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(GROUPS):
        rng = np.random.default_rng(i)
        truth = describe(sample_scene(rng, kind="pair"), rng)
        wrong = corrupt(truth, "relation", rng)
        assert wrong is not None
        images = [render(draw_for(truth, rng)), degrade(render(draw_for(wrong, rng)), rng)]
        names = [f"{i}_0.png", f"{i}_1.png"]
        for name, which in zip(names, (better(i), 1 - better(i)), strict=True):
            Image.fromarray(to_uint8(images[which])).save(folder / name)
        scores = [0, 0] if i == 4 else [1 - better(i), better(i)]
        append_line(
            folder / "pairs.jsonl", {"id": f"g{i}", "prompt": write(truth, rng), "images": names, "scores": scores}
        )
    (folder / "5_1.png").write_bytes(b"no image")
    return folder / "pairs.jsonl"


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by their ids."""
    return {row["id"]: row for row in whole_lines(out)}


def skipped(out: Path) -> dict[str, str]:
    """Why groups are not in a file, by their ids."""
    return {key: row["reason"] for key, row in rows(Path(f"{out}.skipped.jsonl")).items()}


def better(number: int | str) -> int:
    """The place of the better candidate in the group of this number or id."""
    return int(int(str(number).removeprefix("g")) % 3 == 2)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five reds of 0, 51, 102, 153 and 204, that is 0, 0.2, 0.4, 0.6 and 0.8."""
    for i in range(5):
        Image.new("RGB", (8, 8 + i), (51 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return listed(tmp_path, *({"image": f"{i}.png", "prompt": f"red\u2028number {i}"} for i in range(5)))


def listed(folder: Path, *rows: dict[str, Any], name: str = "list.jsonl") -> Path:
    """A list of images, with an empty line at its end."""
    append_line(folder / name, *rows)
    with open(folder / name, "a") as stream:
        stream.write("\n")
    return folder / name
