"""Annotation under torchrun: pairs of clips and labels of segments by two processes, as by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_align.data.media import save_clip
from t2i_align.labeling.curate import pairs
from t2i_align.labeling.segments import label
from t2i_align.utils.distributed import Distributed
from t2i_align.utils.files import whole_lines
from tests.runs import command, moving_clip


def test_batches_are_shared_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert [*Distributed().share(range(9), 2)] == [[2, 3], [6, 7]]


@pytest.mark.slow
def test_two_processes_make_and_label_the_pairs_of_one(path: Callable[[str], Path], tmp_path: Path) -> None:
    """The same rows and skips, the clips byte by byte, and one report."""
    real = tmp_path / "real"
    for number in range(5):
        save_clip(moving_clip(number, 9 if number < 4 else 3), real / f"{number}.mp4", 16)
        (real / f"{number}.txt").write_text("a fox runs")
    alone, both = tmp_path / "alone", tmp_path / "both"
    pairs(real, alone, model=path("wan"), steps=7, fps=16, guidance=1.0, progress=False)
    how = ["--model", path("wan"), "--steps", 7, "--fps", 16, "--guidance", 1]
    told = command("video", "pairs", real, "--out", both, *how, processes=2, cwd=tmp_path)
    assert told.count("4 groups") == 1 and "1 skipped" in told
    label(alone / "pairs.jsonl", alone / "labels.jsonl", scorers="motion_smoothness", seconds=0.25, fps=16.0,
          least_decided=0.0, progress=False)  # fmt: skip
    how = ["--scorers", "motion_smoothness", "--seconds", 0.25, "--fps", 16, "--least-decided", 0]
    command("video", "segments", both / "pairs.jsonl", "--out", both / "labels.jsonl", *how, processes=2, cwd=tmp_path)
    for name in ("pairs.jsonl", "pairs.jsonl.skipped.jsonl", "labels.jsonl"):
        one, other = ({row["id"]: row for row in whole_lines(folder / name)} for folder in (alone, both))
        assert one == other and len(one) == (1 if "skipped" in name else 4)
    for file in alone.glob("clips/*/*"):
        assert file.read_bytes() == (both / file.relative_to(alone)).read_bytes()
    assert not [*both.glob(".*.[0-9].jsonl*")]
    assert json.loads((both / "labels.jsonl.settings.json").read_text())["finished"]
