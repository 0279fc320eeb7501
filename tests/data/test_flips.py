"""Mirrored groups: both sides alike, in a cache of their own, with a warning where prompts name a side."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_align import align
from t2i_align.data import readers
from t2i_align.data.flips import flipped
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from tests.runs import image, jsonl_pairs, run_values


def test_each_group_comes_mirrored_as_well(tmp_path: Path) -> None:
    """A damaged image's mirror image is skipped with the reason."""
    file = jsonl_pairs(tmp_path, 2)
    (tmp_path / "1_bad.png").write_bytes(b"no image")
    one, mirrored, two, skipped = flipped(readers.read(file))
    assert isinstance(one, Group) and isinstance(mirrored, Group) and isinstance(two, Group)
    assert mirrored.id == f"{one.id}#flipped" and (mirrored.prompt, mirrored.scores) == (one.prompt, one.scores)
    for seed, media in enumerate(mirrored.candidates):
        assert isinstance(media, bytes)
        pixels = np.asarray(Image.open(io.BytesIO(media)))
        np.testing.assert_array_equal(pixels, np.asarray(image(seed))[:, ::-1])
    assert not isinstance(skipped, Group) and skipped.id.endswith("#flipped") and "not an image" in skipped.reason


def test_a_run_trains_on_both_and_warns_of_sides(
    sd_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl_pairs(tmp_path / "data", 4)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["prompt"] = "a fox on the Right"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = run_values(sd_path, file, tmp_path / "run", train__steps=1, data__flip=True)
    align(values)
    assert "8 groups" in capsys.readouterr().out
    assert "data.flip: 1 of 4 texts speak of left or right, as 'a fox on the Right'" in caplog.text
    caplog.clear()
    align(run_values(sd_path, file, tmp_path / "plain", train__steps=1))
    assert "4 groups" in capsys.readouterr().out and "data.flip" not in caplog.text
    with pytest.raises(UserError, match=r"data\.flip must be false without data\.cache"):
        align(run_values(sd_path, file, tmp_path / "no", data__flip=True, data__cache=False))
