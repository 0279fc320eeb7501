"""Annotations continue after a kill; finished, foreign and input files are not written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_align.errors import UserError
from t2i_align.labeling.annotate import caption, perturb
from t2i_align.utils.files import whole_lines
from tests.data.test_examples import write_jsonl
from tests.labeling.conftest import GROUPS
from tests.labeling.test_annotate import QUIET


class Recorder:
    """A captioner that says how bright an image is and dies after so many batches."""

    name = "recorder"

    def __init__(self, batches: int = 10**9) -> None:
        self.batches, self.seen = batches, 0

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.seen += len(images)
        # The answer depends on the whole batch, as it does for a model that pads.
        total = sum(float(np.asarray(image).mean()) for image in images)
        return [f"{np.asarray(image).mean():.3f} of {total:.3f}" for image in images]


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 5])
def test_continued_file_equals_an_uninterrupted_one(batches: int, source: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    first = Recorder()
    caption(source, "c", whole, captioner=first, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        caption(source, "c", parts, captioner=Recorder(batches), **QUIET)
    second = Recorder()
    caption(source, "c", parts, captioner=second, **QUIET)
    for ending in ("", ".skipped.jsonl", ".settings.json"):
        assert Path(f"{parts}{ending}").read_bytes() == Path(f"{whole}{ending}").read_bytes()
    assert second.seen < first.seen or batches < 2  # two batches of images make one of groups


@pytest.mark.parametrize("cut", range(0, 900, 90))
def test_half_written_line_is_repaired(cut: int, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    caption(source, "c", out, captioner=Recorder(), **QUIET)
    whole, why = out.read_bytes(), Path(f"{out}.skipped.jsonl").read_bytes()
    out.write_bytes(whole[:cut])
    Path(f"{out}.skipped.jsonl").write_bytes(why[: cut // 9])
    unfinish(out)
    caption(source, "c", out, captioner=Recorder(), **QUIET)
    assert (out.read_bytes(), Path(f"{out}.skipped.jsonl").read_bytes()) == (whole, why)


def unfinish(out: Path) -> None:
    file = Path(f"{out}.settings.json")
    file.write_text(file.read_text().replace('"finished": true', '"finished": false'))


def test_skipped_and_duplicate_rows_are_recorded_once(source: Path, tmp_path: Path) -> None:
    first, second, *others = source.read_text().splitlines()
    source.write_text("\n".join([first, first, second.replace("1_0.png", "gone.png"), *others[:2]]) + "\n")
    out = tmp_path / "n.jsonl"
    for _ in range(2):
        summary = perturb(source, out, **QUIET)
        assert (summary.groups, summary.skipped) == (3, 2)
        reasons = [row["reason"] for row in whole_lines(f"{out}.skipped.jsonl")]
        assert reasons == ["duplicate id 'g0'; the first group with it was kept", "no such image: gone.png"]
        unfinish(out)


def test_other_settings_are_refused_and_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "n.jsonl"
    perturb(source, out, **QUIET)
    before = out.read_bytes()
    unfinish(out)
    with pytest.raises(UserError, match=r"n.jsonl.* other settings: settings.perturber.strength is 1 there, 2 here"):
        perturb(source, out, strength=2, **QUIET)
    (source.parent / "0_0.png").write_bytes((source.parent / "1_0.png").read_bytes())
    with pytest.raises(UserError, match=r"other settings: settings.source is '\w+' there, '\w+' here"):
        perturb(source, out, **QUIET)
    assert out.read_bytes() == before
    perturb(source, out, strength=2, force=True, **QUIET)
    assert out.read_bytes() != before


def test_finished_and_foreign_files_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "n.jsonl"
    perturb(source, out, **QUIET)
    with pytest.raises(UserError, match=r"n.jsonl: exists and is finished"):
        perturb(source, out, **QUIET)
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text("mine\n")
    for force in (False, True):
        with pytest.raises(UserError, match=r"mine.jsonl: exists, and was not made by this command"):
            perturb(source, foreign, force=force, **QUIET)
    assert foreign.read_text() == "mine\n"


def test_inputs_are_never_written(source: Path, tmp_path: Path) -> None:
    """Under its own name, a link's, or as one of the files that the source leads to; not even where it is forced."""
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"id": f"g{i}", "scores": [0, 1]} for i in range(GROUPS)])
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "hard.jsonl").hardlink_to(source)
    (tmp_path / "spec.yaml").write_text(f"path: {source}\n")
    before = source.read_bytes(), scores.read_bytes()
    for given, out in ((source, source), (source, "link.jsonl"), (source, "hard.jsonl"), ("spec.yaml", source)):
        with pytest.raises(UserError, match="is read to make"):
            perturb(tmp_path / given, tmp_path / out, force=True, **QUIET)
    with pytest.raises(UserError, match=r"scores.jsonl: is read to make"):
        caption(source, "p", scores, annotations=[scores], force=True, **QUIET)
    assert (source.read_bytes(), scores.read_bytes()) == before


def test_a_finished_file_that_was_removed_is_made_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "n.jsonl"
    for strength in (1, 2):
        assert perturb(source, out, strength=strength, **QUIET).groups == GROUPS
        out.unlink()
