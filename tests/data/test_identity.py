"""A source's identity follows what is in it, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from t2i_align.data import opening
from tests import formats
from tests.data.test_examples import jpeg, pick_rows, write_images, write_jsonl, write_parquet


def test_identity_follows_the_contents(tmp_path: Path) -> None:
    """An image changed in place changes its source, a copy elsewhere does not; both for small and for large ones."""
    write_images(tmp_path / "one", ["a.jpg", "b.jpg"])
    entry = {"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg"}
    file = write_jsonl(tmp_path / "one" / "d.jsonl", [entry])
    before = opening.survey(file, "jsonl").identity
    write_images(tmp_path / "two", ["a.jpg", "b.jpg"])
    assert opening.survey(write_jsonl(tmp_path / "two" / "d.jsonl", [entry]), "jsonl").identity == before
    (tmp_path / "one" / "b.jpg").write_bytes(jpeg(9))
    assert opening.survey(file, "jsonl").identity != before


def test_other_files_do_not_change_the_identity_of_folders(tmp_path: Path) -> None:
    """A run's output below the pairs, or what a file manager leaves there, does not make them another source."""
    write_images(tmp_path / "chosen", ["fox.png"])
    write_images(tmp_path / "rejected", ["fox.png"])
    (tmp_path / "captions").mkdir()
    before = opening.survey(tmp_path, "folders").identity
    write_images(tmp_path / "run" / "validation", ["step_000100.png"])
    for name in ("run.yaml", ".DS_Store", "chosen/.DS_Store", "chosen/._fox.png", "chosen/._fox.txt", "rejected/a.log"):
        (tmp_path / name).write_text("?")
    survey = opening.survey(tmp_path, "folders")
    assert (survey.identity, survey.embedded_bytes) == (before, 0)
    seen = {before}
    for name in ("metadata.jsonl", "chosen/metadata.jsonl", "captions/fox.txt", "chosen/fox.txt", "rejected/fox.png"):
        write_jsonl(tmp_path / name, [{"file_name": "fox.png", "text": name}])
        seen.add(opening.survey(tmp_path, "folders").identity)
    assert len(seen) == 6


def test_identity_of_large_sources_uses_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", pick_rows(2))
    monkeypatch.setattr("t2i_align.data.opening.CONTENT_HASHED_UP_TO", 10)
    before = opening.survey(file, "pickapic").identity
    os.utime(file, ns=(1, 1))
    assert opening.survey(file, "pickapic").identity != before


def test_identity_follows_what_a_source_file_describes(tmp_path: Path) -> None:
    source = formats.write(tmp_path, "vote_counts")
    seen = {opening.survey(source, "described").identity}
    changes = [
        (source, b"[for_left, for_right]", b"[for_right, for_left]"),
        (tmp_path / "vote_counts" / "votes.tsv", b"\t7", b"\t8"),
        (tmp_path / "vote_counts" / "p" / "1.png", b"PNG", b"png"),
    ]
    for file, old, new in changes:
        file.write_bytes(file.read_bytes().replace(old, new))
        seen.add(opening.survey(source, "described").identity)
    assert len(seen) == 4
