"""Readers: every source comes to groups, best first; what cannot be used is a clear error or a recorded skip."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_align.data import readers
from t2i_align.data.readers import READERS, read, register
from t2i_align.data.schema import Group, Skipped
from t2i_align.errors import UserError
from tests.data.test_examples import jpeg, pick_rows, write_images, write_jsonl, write_parquet
from tests.formats import groups, skips

# Pick-a-Pic ---------------------------------------------------------------------------------------------------------


def test_pickapic_pairs_come_best_first(tmp_path: Path) -> None:
    result = groups(write_parquet(tmp_path / "a.parquet", pick_rows(6)))
    assert [group.id for group in result] == [str(1000 + row) for row in range(6)]
    assert [group.candidates for group in result] == [(jpeg(2 * row), jpeg(2 * row + 1)) for row in range(6)]
    assert {group.scores for group in result} == {(1.0, 0.0)}
    assert result[3].prompt == "caption 3" and result[3].user == "3"


def test_pickapic_folder_without_ranking_ids(tmp_path: Path) -> None:
    rows = pick_rows(2)
    rows["ranking_id"] = [7, 7]
    (tmp_path / "deep").mkdir()
    write_parquet(tmp_path / "b.parquet", rows)
    write_parquet(tmp_path / "deep" / "a.parquet", rows)
    assert [group.id for group in groups(tmp_path)] == [
        "b.parquet:0",
        "b.parquet:1",
        "deep/a.parquet:0",
        "deep/a.parquet:1",
    ]


def test_pickapic_image_struct(tmp_path: Path) -> None:
    """`datasets` writes an Image feature as a struct of bytes and path; a path stays inside the folder."""
    rows = pick_rows(3)
    (tmp_path / "far.jpg").write_bytes(jpeg(50))
    rows["jpg_0"] = [
        {"bytes": rows["jpg_0"][0], "path": None},
        {"bytes": None, "path": "far.jpg"},
        {"bytes": None, "path": None},
    ]
    file = write_parquet(tmp_path / "a.parquet", rows)
    assert groups(file)[0].candidates[0] == jpeg(0)
    assert groups(file)[1].candidates[1] == tmp_path / "far.jpg"
    assert skips(file) == {"1002": "'jpg_0': an image is missing"}


def test_pickapic_skips_say_why(tmp_path: Path) -> None:
    rows = pick_rows(8)
    rows["has_label"][0] = False
    rows["label_0"][1] = None
    rows["label_0"][2], rows["label_1"][2] = 0.2, 0.2
    rows["caption"][3] = None
    rows["jpg_1"][4] = b""
    rows["caption"][5] = "  "
    rows["label_0"][6] = rows["label_1"][6] = 0.5
    file = write_parquet(tmp_path / "a.parquet", rows)
    reasons = skips(file)
    for row, expected in enumerate(["not labelled", "'label_0'", "add up to 1", "no 'caption'", "jpg_1", "empty"]):
        assert expected in reasons[str(1000 + row)]
    assert [(group.id, group.scores) for group in groups(file)] == [("1006", (0.5, 0.5)), ("1007", (1.0, 0.0))]


def test_pickapic_missing_column_before_any_work(tmp_path: Path) -> None:
    """The second file lacks a column: that is found before the first group of the first file is given out."""
    write_parquet(tmp_path / "a.parquet", pick_rows(2))
    rows = pick_rows(2)
    del rows["label_1"]
    write_parquet(tmp_path / "b.parquet", rows)
    with pytest.raises(UserError, match=r"b\.parquet: column 'label_1' is missing\. Columns found: jpg_0, jpg"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("label_0", ["high", "low"], "'label_0' must be a finite number, found 'high'"),
        ("label_0", [-0.1, 2.0], "'label_0' and 'label_1' must lie in [0, 1] and add up to 1, found -0.1 and 0.0"),
        ("label_0", [float("inf")] * 2, "'label_0' must be a finite number, found inf"),
        ("caption", [1, 2], "'caption' must be text, found 1"),
        ("jpg_1", ["a", "b"], "no such image: a"),
        ("jpg_1", [1, 2], "'jpg_1': expected an image or its path, found 1"),
        ("jpg_1", [["a"], ["b"]], "'jpg_1': expected an image or its path, found ['a']"),
    ],
)
def test_pickapic_values_that_cannot_be_used(tmp_path: Path, column: str, values: list[Any], reason: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", {**pick_rows(2), column: values})
    survey = readers.survey(file)
    assert survey.groups == 0 and survey.reasons[0] == f"{file}, row 0: {reason}"


def test_pickapic_cut_short_or_without_rows(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", pick_rows(8))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet"):
        read(file)
    pq.write_table(pa.table(pick_rows(2)).slice(0, 0), file)
    with pytest.raises(UserError, match=r"a\.parquet: no rows"):
        list(read(file))


def test_pickapic_damaged_page(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", pick_rows(40))
    damaged = bytearray(file.read_bytes())
    place = damaged.index(jpeg(20)) - 60  # the page header before an image in the middle
    damaged[place : place + 50] = bytes(50)
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read after row \d+"):
        list(read(file))


@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(0, 1), st.just(float("nan"))),
            st.one_of(st.none(), st.text(max_size=8)),
            st.one_of(st.none(), st.booleans()),
            st.one_of(st.none(), st.binary(max_size=3)),
        ),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=40, deadline=None)
def test_pickapic_accounts_for_every_row(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    labels, captions, labelled, images = zip(*rows, strict=True)
    table = pa.table(
        {
            "jpg_0": pa.array(images, pa.binary()),
            "jpg_1": pa.array([b"x"] * len(rows), pa.binary()),
            "caption": pa.array(captions, pa.string()),
            "label_0": pa.array(labels, pa.float64()),
            "label_1": pa.array([None if label is None else 1 - label for label in labels], pa.float64()),
            "has_label": pa.array(labelled, pa.bool_()),
        }
    )
    file = tmp_path_factory.mktemp("fuzz") / "a.parquet"
    pq.write_table(table, file)
    items = list(read(file))
    assert [item.id for item in items] == [f"a.parquet:{row}" for row in range(len(rows))]
    for item, (label, caption, judged, image) in zip(items, rows, strict=True):
        usable = label is not None and label == label and (caption or "").strip() and judged is not False and image
        assert isinstance(item, Group) == bool(usable)
        if isinstance(item, Group):
            assert item.scores[0] >= item.scores[1]
            assert item.candidates == ((image, b"x") if label >= 1 - label else (b"x", image))


# JSON Lines ---------------------------------------------------------------------------------------------------------


def test_jsonl_pairs_and_rankings(tmp_path: Path) -> None:
    write_images(tmp_path / "p", ["a.jpg", "b.jpg", "c.jpg"])
    entries = [
        {"prompt": "x", "chosen": "p/a.jpg", "rejected": "p/b.jpg", "user": 4, "note": "left alone"},
        {"id": "r", "prompt": "y", "images": ["p/a.jpg", "p/b.jpg", "p/c.jpg"], "scores": [1, 3, 2.5],
         "captions": ["A", "B", "C"]},
        {"prompt": "z", "images": ["p/c.jpg"], "scores": [-1]},
    ]  # fmt: skip
    a, b, c = (tmp_path / "p" / name for name in ("a.jpg", "b.jpg", "c.jpg"))
    for file in (write_jsonl(tmp_path / "d.jsonl", entries), tmp_path / "d.json"):
        if file.suffix == ".json":
            file.write_text(json.dumps(entries))
        pair, ranking, single = groups(file)
        assert (pair.candidates, pair.scores, pair.user) == ((a, b), (1.0, 0.0), "4")
        assert (ranking.id, ranking.candidates, ranking.scores) == ("r", (b, c, a), (3.0, 2.5, 1.0))
        assert ranking.captions == ("B", "C", "A")
        assert (single.candidates, single.scores) == ((c,), (-1.0,))
        assert pair.id != single.id


def test_jsonl_skips_and_duplicates(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    pair = {"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg"}
    file = write_jsonl(
        tmp_path / "d.jsonl",
        [
            {**pair, "id": "one"},
            {**pair, "id": "gone", "rejected": "gone.jpg"},
            {"id": "nan", "prompt": "x", "images": ["a.jpg"], "scores": [float("nan")]},
            {"id": "huge", "prompt": "x", "images": ["a.jpg"], "scores": [10**400]},
            {**pair, "id": "blank", "prompt": " "},
            {**pair, "id": "odd", "prompt": "\ud800"},
        ],
    )
    with open(file, "a") as stream:
        stream.write("\n" + json.dumps({**pair, "id": "one", "prompt": "second"}) + "\n")
    assert [(group.id, group.prompt) for group in groups(file)] == [("one", "x")]
    reasons = skips(file)
    assert reasons["gone"] == "no such image: gone.jpg"
    assert "finite" in reasons["nan"] and "finite" in reasons["huge"]
    assert "empty" in reasons["blank"] and "Unicode" in reasons["odd"]
    assert "duplicate id 'one'" in reasons["one"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"chosen": "a.jpg"}, "expected the keys .*chosen and rejected and prompt, or .*; found 'prompt', 'chosen'"),
        ({"prompt": 3, "chosen": "a.jpg", "rejected": "a.jpg"}, "'prompt' must be text, found 3"),
        ({"images": ["a.jpg"], "scores": [1, 2]}, "1 candidates, but 2 scores"),
        ({"images": ["a.jpg"], "scores": ["best"]}, r"'scores' \[0\] must be a finite number, found 'best'"),
        ({"images": ["a.jpg"], "scores": [1], "captions": []}, "1 candidates, but 0 captions"),
        ({"images": ["a.jpg"], "scores": [1], "captions": [2]}, r"'captions' must be a list of texts, found \[2\]"),
        ({"images": ["a.jpg"], "scores": [1], "user": {}}, "'user' must be text or number, found {}"),
    ],
)
def test_jsonl_rows_that_cannot_be_used(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    write_images(tmp_path, ["a.jpg"])
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "x", **entry}])
    (item,) = read(file)
    assert isinstance(item, Skipped) and item.origin == f"{file}, line 1" and re.search(reason, item.reason)


# Folders ------------------------------------------------------------------------------------------------------------


def test_folders(tmp_path: Path) -> None:
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


def test_folders_metadata_means_the_winner(tmp_path: Path) -> None:
    """Its own entry comes before one without a folder, that before the loser's; another folder's is not meant."""
    for folder in ("chosen", "rejected"):
        write_images(tmp_path / folder, ["a.png", "b.png", "c.png", "d.png"])
    listed = ["chosen/a.png", "a.png", "rejected/a.png", "b.png", "rejected/b.png", "rejected/c.png", "old/d.png"]
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": name} for name in listed])
    assert [group.prompt for group in groups(tmp_path)] == ["chosen/a.png", "b.png", "rejected/c.png"]
    assert "no caption" in skips(tmp_path)["d"]
    write_jsonl(tmp_path / "chosen" / "metadata.jsonl", [{"file_name": "a.png", "text": "beside"}])
    assert groups(tmp_path)[0].prompt == "beside"


def test_folders_that_are_unclear(tmp_path: Path) -> None:
    for name in ("winner", "good", "loser"):
        write_images(tmp_path / name, ["a.jpg"])
    with pytest.raises(UserError, match=r"expected one winner folder .* found good, winner"):
        list(read(tmp_path))
    with pytest.raises(UserError, match=r"expected a folder .* found a file"):
        list(read(tmp_path / "good" / "a.jpg", "folders"))


def test_folder_links_stay_inside(tmp_path: Path) -> None:
    write_images(tmp_path, ["secret.jpg"])
    write_images(tmp_path / "data" / "winner", ["b.jpg"])
    write_images(tmp_path / "data" / "loser", ["a.jpg"])
    (tmp_path / "data" / "winner" / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(UserError, match="leads outside"):
        list(read(tmp_path / "data"))


# The registry -------------------------------------------------------------------------------------------------------


def test_formats_are_found_or_listed(tmp_path: Path) -> None:
    (tmp_path / "notes.xyz").write_text("?")
    with pytest.raises(UserError, match=r"no reader recognises this file.*folders, .*jsonl, pairs, pickapic"):
        read(tmp_path / "notes.xyz")
    with pytest.raises(UserError, match="no reader recognises this folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="Did you mean 'pickapic'"):
        read(tmp_path / "notes.xyz", "pickapick")
    with pytest.raises(UserError, match="testbed:pairs"):
        read("testbed:pears")


def test_your_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One function makes a format; order, ids and prompts are seen to for it."""
    monkeypatch.setattr(readers, "READERS", dict(READERS))

    @register("votes", detects=lambda path: path.suffix == ".votes")
    def read_votes(path: Path) -> Iterator[Group | Skipped]:
        for line in path.read_text().splitlines():
            name, up, down = line.split()
            scores = (float(up), float(down))
            yield Group(id=name, prompt=name, candidates=(b"u", b"d"), scores=scores, origin=f"{path}, {name}")

    (tmp_path / "a.votes").write_text("fox 2 5\nowl 3 3\nfox 1 0\n")
    result = groups(tmp_path / "a.votes")
    assert [(group.id, group.candidates, group.scores) for group in result] == [
        ("fox", (b"d", b"u"), (5.0, 2.0)),
        ("owl", (b"u", b"d"), (3.0, 3.0)),
    ]
    assert "duplicate" in skips(tmp_path / "a.votes")["fox"]
    survey = readers.survey(tmp_path / "a.votes")
    assert (survey.rows, survey.candidates, survey.ties, len(survey.texts)) == (3, {2: 2}, {2: 1}, 2)
    with pytest.raises(ValueError, match="already"):
        register("votes")(read_votes)


def test_identity_follows_the_contents(tmp_path: Path) -> None:
    """An image changed in place changes its source, a copy elsewhere does not; both for small and for large ones."""
    write_images(tmp_path / "one", ["a.jpg", "b.jpg"])
    entry = {"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg"}
    file = write_jsonl(tmp_path / "one" / "d.jsonl", [entry])
    before = readers.survey(file, "jsonl").identity
    write_images(tmp_path / "two", ["a.jpg", "b.jpg"])
    assert readers.survey(write_jsonl(tmp_path / "two" / "d.jsonl", [entry]), "jsonl").identity == before
    (tmp_path / "one" / "b.jpg").write_bytes(jpeg(9))
    assert readers.survey(file, "jsonl").identity != before


def test_other_files_do_not_change_the_identity_of_folders(tmp_path: Path) -> None:
    """A run's output below the pairs, or what a file manager leaves there, does not make them another source."""
    write_images(tmp_path / "chosen", ["fox.png"])
    write_images(tmp_path / "rejected", ["fox.png"])
    (tmp_path / "captions").mkdir()
    before = readers.survey(tmp_path, "folders").identity
    write_images(tmp_path / "run" / "validation", ["step_000100.png"])
    for name in ("run.yaml", ".DS_Store", "chosen/.DS_Store", "chosen/._fox.png", "chosen/._fox.txt", "rejected/a.log"):
        (tmp_path / name).write_text("?")
    survey = readers.survey(tmp_path, "folders")
    assert (survey.identity, survey.embedded_bytes) == (before, 0)
    seen = {before}
    for name in ("metadata.jsonl", "chosen/metadata.jsonl", "captions/fox.txt", "chosen/fox.txt", "rejected/fox.png"):
        write_jsonl(tmp_path / name, [{"file_name": "fox.png", "text": name}])
        seen.add(readers.survey(tmp_path, "folders").identity)
    assert len(seen) == 6


def test_identity_of_large_sources_uses_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", pick_rows(2))
    monkeypatch.setattr(readers, "CONTENT_HASHED_UP_TO", 10)
    before = readers.survey(file, "pickapic").identity
    os.utime(file, ns=(1, 1))
    assert readers.survey(file, "pickapic").identity != before
