"""`evaluate --save-samples`: what was compared, kept for other scorers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_align.errors import UserError
from t2i_align.evaluation.compare import evaluate
from t2i_align.labeling.score import score
from tests.tiny import random_lora


def test_the_samples_of_both_sides_are_kept_and_can_be_scored(sd_path: Path, tmp_path: Path) -> None:
    """They are those that were compared, by their hashes; forced again without them, they go; others' stay."""
    options = {
        "base": sd_path,
        "aligned": random_lora(sd_path, tmp_path / "lora"),
        "prompts": ["a red circle", "a blue square"],
        "scorers": ["oracle"],
        "out": tmp_path / "out",
        "steps": 1,
        "guidance": 1.0,
        "progress": False,
    }
    result = evaluate(**options, seeds_per_prompt=2, save_samples=True)
    samples = tmp_path / "out" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["aligned", "base"]
    rows = [json.loads(line) for line in (samples / "base" / "samples.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["file"]) for row in rows] == [
        ("a red circle", "00000.png"), ("a red circle", "00001.png"),
        ("a blue square", "00002.png"), ("a blue square", "00003.png"),
    ]  # fmt: skip
    assert [row["seed"] for row in rows] == result.settings["seeds"]
    same = 0
    for row in rows:
        base, aligned = (np.asarray(Image.open(samples / side / row["file"])) for side in ("base", "aligned"))
        same += np.array_equal(base, aligned)
    assert same == result.settings["identical_pairs"] < 4
    score(samples / "base", scorers=["oracle"], out=tmp_path / "scores.jsonl", progress=False)
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 4
    evaluate(**options, force=True)
    assert not samples.exists()
    samples.mkdir()
    (samples / "mine.png").write_bytes(b"a photograph")
    with pytest.raises(UserError, match="samples: is not of an evaluation"):
        evaluate(**options, force=True, save_samples=True)
    assert (samples / "mine.png").is_file()
