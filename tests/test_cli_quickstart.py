"""The quickstart's own part: what it replaces, what it refuses, what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2i_align.errors import UserError
from t2i_align.quickstart import MARKER, TEST_SEED, claim, quickstart
from t2i_align.sources import resolve_prompts


def test_a_new_folder_is_made_and_marked(tmp_path: Path) -> None:
    claim(tmp_path / "runs" / "a")
    assert (tmp_path / "runs" / "a" / MARKER).is_file()


def test_the_output_of_an_earlier_quickstart_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    claim(folder)
    (folder / "run").mkdir()
    (folder / "run" / "old.txt").write_text("old")
    claim(folder)
    assert [file.name for file in folder.iterdir()] == [MARKER]


def test_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that no quickstart wrote"):
        quickstart(output=tmp_path)
    with pytest.raises(UserError, match="this is a file"):
        quickstart(output=tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_wrong_override_leaves_the_earlier_result_in_place(tmp_path: Path) -> None:
    claim(tmp_path / "a")
    (tmp_path / "a" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="unknown key in train 'stesp'"):
        quickstart(["train.stesp=3"], output=tmp_path / "a")
    assert (tmp_path / "a" / "result.json").exists()


def test_the_whole_job_in_small_and_a_second_time(tmp_path: Path) -> None:
    prompts = resolve_prompts("testbed:test")[:4]
    overrides = ["data.limit=8", "train.steps=2", "train.batch_size=4", "optim.warmup_steps=1", "validation.steps=2"]
    for _ in range(2):
        result = quickstart(overrides, output=tmp_path / "q", prompts=prompts, progress=False)
    written = json.loads((tmp_path / "q" / "result.json").read_text())
    for name in ("", "faithfulness_", "quality_"):
        low, high = written[f"{name}win_rate_ci"]
        assert low <= written[f"{name}win_rate"] <= high
    assert written["win_rate"] == result.win_rate
    assert {"mean_before", "mean_after"} <= written.keys()
    assert (written["samples"], written["seed"], written["training_steps"]) == (4, TEST_SEED, 2)
    assert 0 < written["seconds_training"] < written["seconds"]
    assert "<html" in (tmp_path / "q" / "report.html").read_text()
    assert (tmp_path / "q" / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
