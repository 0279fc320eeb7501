"""The quickstart's own part: what it replaces, what it refuses, what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i_align.errors import UserError
from t2i_align.quickstart import MARKER, claim, quickstart, table


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


def test_the_table_shows_rates_intervals_and_the_report() -> None:
    result = {
        "win_rate": 0.8125,
        "win_rate_ci": [0.75, 0.87],
        "faithfulness_win_rate": 0.55,
        "faithfulness_win_rate_ci": [0.51, 0.59],
        "quality_win_rate": 0.9,
        "quality_win_rate_ci": [0.85, 0.94],
        "mean_before": 0.8,
        "mean_after": 0.85,
        "seconds": 170.4,
    }
    text = table(result, "runs/quickstart")
    for part in ("81.2%", "75.0% to 87.0%", "55.0%", "90.0%", "0.800 -> 0.850", "170 seconds", "report.html"):
        assert part in text
