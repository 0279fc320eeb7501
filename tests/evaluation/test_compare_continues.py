"""A killed evaluation continues; one with other settings does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from t2i_align.evaluation import compare as module
from t2i_align.evaluation import sides
from tests.evaluation.conftest import PROMPTS, Run
from tests.evaluation.test_compare import samples
from tests.runs import Killed

STOPS: dict[str, tuple[Any, str, int]] = {
    "second batch of the base": (sides, "sample", 2),
    "first of the aligned": (sides, "sample", 4),
    "scores": (sides, "judge", 2),
    "report": (os, "replace", 1),
    "pairs": (os, "replace", 2),
    "result": (os, "replace", 3),
    "report, and an image is cut": (os, "replace", 1),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_killed_evaluation_continues_and_ends_as_an_uninterrupted_one(
    stop: str, run: Run, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six samples in batches of two a side: each is made once."""
    options = {"aligned": other, "prompts": [*PROMPTS, "moon"], "batch_size": 2}
    whole = run("whole", **options)
    where, name, number = STOPS[stop]
    real, calls, made = getattr(where, name), [], []

    def killed(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, killed)
        run(**options)
    assert not (tmp_path / "out" / "result.json").exists()
    if "cut" in stop:  # by a loss of power, as the end of a batch; what was made after it is made again
        os.truncate(next((tmp_path / "out").glob("*/aligned-000002.png")), 40)
    real_sample = sides.sample
    monkeypatch.setattr(sides, "sample", lambda *a, **k: made.append(a[1]) or real_sample(*a, **k))
    again = run(**options)
    batches = {"second batch of the base": 5, "first of the aligned": 3, "scores": 5, "report, and an image is cut": 2}
    assert len(made) == batches.get(stop, 0)
    assert again.scorers == whole.scorers and samples(tmp_path / "out") == samples(tmp_path / "whole")
    reports = [(tmp_path / name / "report.html").read_text().split("<dt>Time")[0] for name in ("out", "whole")]
    assert reports[0] == reports[1]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["pairs.jsonl", "report.html", "result.json"]


def test_an_unfinished_evaluation_with_other_settings_is_not_continued(
    run: Run, sd_path: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other steps, then other weights of the aligned model."""
    weights = tmp_path / "other"
    shutil.copytree(other, weights)
    options: dict[str, Any] = {"aligned": weights, "prompts": ["cat"]}

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "render", killed)
        run(**options)
    made: list[int] = []
    real = sides.sample
    monkeypatch.setattr(sides, "sample", lambda *a, **k: made.append(k["steps"]) or real(*a, **k))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    run("copy", **options, steps=3)
    assert made == [3, 3]
    shutil.rmtree(weights)
    shutil.copytree(sd_path, weights)
    assert run(**options).settings["identical_pairs"] == 1
    assert made == [3, 3, 2]  # the base's sample is kept


def test_a_base_that_was_drawn_is_not_drawn_again(
    run: Run, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same prompts and options; with an image lost, or other steps, it is."""
    made: list[str] = []
    real = sides.sample
    monkeypatch.setattr(sides, "sample", lambda *a, **k: made.append(a[0].source) or real(*a, **k))
    options: dict[str, Any] = {"aligned": other, "prompts": PROMPTS, "keep_base": tmp_path / "kept"}
    first, count = run("first", **options), len(made)
    second = run("second", **options)
    assert len(made) == count + count // 2 and second.scorers == first.scorers
    assert samples(tmp_path / "first") == samples(tmp_path / "second")
    next((tmp_path / "kept").glob("*/base-000000.png")).unlink()
    for name, steps in (("third", {}), ("fourth", {"steps": 3})):
        made.clear()
        run(name, **options, **steps)
        assert len(made) == count
