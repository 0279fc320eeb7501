"""Folders of winners and losers, and of captioned images: pairs by name, captions beside or listed, what is unclear."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from t2i_align.data import readers
from t2i_align.data.readers import read
from t2i_align.errors import UserError
from tests.data.test_examples import write_images, write_jsonl
from tests.formats import groups, skips, table


def test_pairs_are_files_of_one_name_with_a_caption(tmp_path: Path) -> None:
    write_images(tmp_path / "Chosen", ["b.jpg", "a.png", "c.jpg", "d.jpg", "lonely.jpg", "e.jpg", "e.png"])
    write_images(tmp_path / "rejected", ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "notes.doc"])
    (tmp_path / "Chosen" / "a.txt").write_text(" beside \n")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "b.txt").write_text("in captions")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "chosen/c.jpg", "text": "listed"}])
    result = groups(tmp_path)
    assert [(group.id, group.prompt) for group in result] == [("a", "beside"), ("b", "in captions"), ("c", "listed")]
    assert result[0].candidates == (tmp_path / "Chosen" / "a.png", tmp_path / "rejected" / "a.jpg")
    assert result[0].scores == (1.0, 0.0)
    reasons = skips(tmp_path)
    assert set(reasons) == {"d", "e", "lonely", "rejected/notes.doc"}
    assert "no caption" in reasons["d"] and "e.jpg, e.png" in reasons["e"] and "no loser" in reasons["lonely"]


def test_metadata_means_the_winner(tmp_path: Path) -> None:
    """Its own entry comes before one without a folder, that before the loser's; another folder's is not meant."""
    for folder in ("chosen", "rejected"):
        write_images(tmp_path / folder, ["a.png", "b.png", "c.png", "d.png"])
    listed = ["chosen/a.png", "a.png", "rejected/a.png", "b.png", "rejected/b.png", "rejected/c.png", "old/d.png"]
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": name} for name in listed])
    assert [group.prompt for group in groups(tmp_path)] == ["chosen/a.png", "b.png", "rejected/c.png"]
    assert "no caption" in skips(tmp_path)["d"]
    write_jsonl(tmp_path / "chosen" / "metadata.jsonl", [{"file_name": "a.png", "text": "beside"}])
    assert groups(tmp_path)[0].prompt == "beside"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_captions_in_a_table(tmp_path: Path, name: str) -> None:
    for folder in ("chosen", "rejected"):
        write_images(tmp_path / folder, ["a.png", "b.png"])
    listed = [{"file_name": "chosen/a.png", "caption": "first"}, {"file_name": "chosen\\b.png", "caption": "second"}]
    table(tmp_path / name, listed)
    assert [group.prompt for group in groups(tmp_path)] == ["first", "second"]
    table(tmp_path / name, [{"file_name": "chosen/a.png", "title": "x"}])
    with pytest.raises(
        UserError, match=rf"{name}, (line|row) \d: expected 'file_name' and one of prompt, caption, text"
    ):
        groups(tmp_path)


def test_names_and_captions_of_other_systems(tmp_path: Path) -> None:
    """Accents apart and together are one name; a caption that is not UTF-8 costs its pair alone, as does a pipe."""
    apart, together = "cafe\u0301", "caf\u00e9"
    write_images(tmp_path / "chosen", [f"{apart}.png", "b.png", "c.png"])
    write_images(tmp_path / "rejected", [f"{together}.png", "b.png"])
    os.mkfifo(tmp_path / "rejected" / "c.png")
    (tmp_path / "chosen" / f"{together}.txt").write_text("a cafe")
    (tmp_path / "chosen" / "b.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert [(group.id, group.prompt) for group in groups(tmp_path)] == [(together, "a cafe")]
    reasons = skips(tmp_path)
    assert reasons["b"].startswith("b.txt must be UTF-8 text") and reasons["c"] == "no loser image of this name"
    assert "rejected/c.png" in reasons


def test_unclear_folders_are_refused(tmp_path: Path) -> None:
    for name in ("winner", "good", "loser"):
        write_images(tmp_path / name, ["a.jpg"])
    with pytest.raises(UserError, match=r"expected one winner folder .* found good, winner"):
        list(read(tmp_path))
    with pytest.raises(UserError, match=r"expected a folder .* found a file"):
        list(read(tmp_path / "good" / "a.jpg", "folders"))


def test_links_stay_inside(tmp_path: Path) -> None:
    write_images(tmp_path, ["secret.jpg"])
    write_images(tmp_path / "data" / "winner", ["b.jpg"])
    write_images(tmp_path / "data" / "loser", ["a.jpg"])
    (tmp_path / "data" / "winner" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(UserError, match="leads outside"):
        list(read(tmp_path / "data"))


def test_captions_beside_in_a_folder_or_listed(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "d.png"])
    (tmp_path / "clip").mkdir()
    write_images(tmp_path / "clip", ["0.jpg", "1.jpg"])
    (tmp_path / "captions").mkdir()
    (tmp_path / "a.txt").write_text("a fox\n")
    (tmp_path / "captions" / "clip.caption").write_text("an owl flies")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.jpg", "text": "a cat"}) + "\n")
    (tmp_path / "notes.pdf").write_text("x")
    assert readers.detect(tmp_path) == "captioned"
    liked = {group.id: (group.prompt, group.scores) for group in groups(tmp_path)}
    assert liked == {"a": ("a fox", (1.0,)), "b": ("a cat", (1.0,)), "clip": ("an owl flies", (1.0,))}
    reasons = skips(tmp_path)
    assert reasons["c"].startswith("no caption: neither c.txt beside it")
    assert reasons["d"] == "several of this name: d.jpg, d.png"
    assert reasons["notes.pdf"].startswith("no image or clip") and len(reasons) == 3


def test_images_without_any_caption_are_not_recognised(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "other.txt").write_text("a caption of nothing")
    with pytest.raises(UserError, match="no reader recognises this folder"):
        readers.detect(tmp_path)
