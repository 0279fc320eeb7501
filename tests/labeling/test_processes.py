"""Annotation under torchrun: pairs of clips and labels of segments by two processes, as by one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2i_align.data.media import save_clip
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.files import whole_lines
from tests.runs import command, moving_clip


def test_batches_are_shared_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert [*Distributed().share(range(9), 2)] == [[2, 3], [6, 7]]


@pytest.mark.slow
def test_two_processes_make_and_label_the_pairs_of_one(path: Callable[[str], Path], tmp_path: Path) -> None:
    """The clips byte by byte, skips of both, one report; what one has begun the two continue."""
    real = tmp_path / "real"
    for number in range(5):
        save_clip(moving_clip(number, 9 if number < 4 else 3), real / f"{number}.mp4", 16)
        (real / f"{number}.txt").write_text("a fox runs")

    def made(out: str, processes: int) -> tuple[dict[str, Any], ...]:
        table, labels = tmp_path / out / "pairs.jsonl", tmp_path / out / "labels.jsonl"
        options = ["--model", path("wan"), "--steps", 4, "--fps", 16, "--guidance", 1]
        told = command("video", "pairs", real, "--out", tmp_path / out, *options, processes=processes, cwd=tmp_path)
        assert told.count("4 groups") == 1 and "1 skipped" in told
        how = ["--scorers", "motion_smoothness", "--seconds", 0.25, "--fps", 16, "--least-decided", 0]
        command("video", "segments", table, "--out", labels, *how, processes=processes, cwd=tmp_path)
        assert not [*table.parent.glob(".*.[0-9].jsonl*")]
        assert json.loads(Path(f"{labels}.settings.json").read_text())["finished"]
        files = (table, Path(f"{table}.skipped.jsonl"), labels)
        return tuple({row["id"]: row for row in whole_lines(file)} for file in files)

    alone, both = made("alone", 1), made("both", 2)
    assert alone == both and len(alone[0]) == 4 and [*alone[1]] == ["4"]
    for row in alone[0].values():
        for name in row["videos"]:
            assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    (tmp_path / "half").mkdir()
    for name in ("clips", "pairs.jsonl.settings.json"):
        os.rename(tmp_path / "both" / name, tmp_path / "half" / name)
    text = (
        (tmp_path / "half" / "pairs.jsonl.settings.json").read_text().replace('"finished": true', '"finished": false')
    )
    (tmp_path / "half" / "pairs.jsonl.settings.json").write_text(text)
    (tmp_path / "half" / "pairs.jsonl").write_text(json.dumps(alone[0]["1"]) + "\n")
    assert made("half", 2) == alone
