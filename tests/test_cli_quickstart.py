"""The quickstart's own part: what it replaces, what it refuses, what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i_align.errors import UserError
from t2i_align.quickstart import MARKER, claim, quickstart


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
