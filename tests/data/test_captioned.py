"""Folders of captioned images or clips: each is a liked sample; what has no caption is skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2i_align.data import readers
from t2i_align.data.schema import Group, Skipped
from t2i_align.errors import UserError
from tests.data.test_examples import write_images


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
    items = list(readers.read(tmp_path))
    found = {item.id: (item.prompt, item.scores) for item in items if isinstance(item, Group)}
    assert found == {"a": ("a fox", (1.0,)), "b": ("a cat", (1.0,)), "clip": ("an owl flies", (1.0,))}
    reasons = {item.id: item.reason for item in items if isinstance(item, Skipped)}
    assert reasons["c"].startswith("no caption: neither c.txt beside it")
    assert reasons["d"] == "several of this name: d.jpg, d.png"
    assert reasons["notes.pdf"].startswith("no image or clip") and len(reasons) == 3


def test_images_without_any_caption_are_not_recognised(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "other.txt").write_text("a caption of nothing")
    with pytest.raises(UserError, match="no reader recognises this folder"):
        readers.detect(tmp_path)
