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

from t2i_align.data import opening
from t2i_align.data.readers import read, register
from t2i_align.data.schema import Group, Skipped
from t2i_align.data.tables import header
from t2i_align.errors import UserError
from tests.data.test_examples import jpeg, pick_rows, write_images, write_jsonl, write_parquet
from tests.formats import groups, skips

# Pick-a-Pic ---------------------------------------------------------------------------------------------------------


def test_pickapic_pairs_come_best_first(tmp_path: Path) -> None:
    rows = pick_rows(6)
    rows["label_0"][4] = rows["label_1"][4] = 0.5
    result = groups(write_parquet(tmp_path / "a.parquet", rows))
    assert [group.id for group in result] == [str(1000 + row) for row in range(6)]
    assert [group.candidates for group in result] == [(jpeg(2 * row), jpeg(2 * row + 1)) for row in range(6)]
    assert [group.scores for group in result] == [(0.5, 0.5) if row == 4 else (1.0, 0.0) for row in range(6)]
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
        ("has_label", [False, True], "not labelled (has_label is false)"),
        ("caption", [None, "x"], "no 'caption'"),
        ("caption", ["  ", "x"], "the prompt is empty"),
        ("caption", [1, 2], "'caption' must be text, found 1"),
        ("label_0", [None, 0.0], "'label_0' must be a finite number, found None"),
        ("label_0", [0.2, 0.0], "'label_0' and 'label_1' must lie in [0, 1] and add up to 1, found 0.2 and 0.0"),
        ("label_0", ["high", "low"], "'label_0' must be a finite number, found 'high'"),
        ("label_0", [-0.1, 2.0], "'label_0' and 'label_1' must lie in [0, 1] and add up to 1, found -0.1 and 0.0"),
        ("label_0", [float("inf")] * 2, "'label_0' must be a finite number, found inf"),
        ("jpg_1", [b"", b"x"], "'jpg_1': an image is missing"),
        ("jpg_1", ["a", "b"], "no such image: a"),
        ("jpg_1", [1, 2], "'jpg_1': expected an image or its path, found 1"),
        ("jpg_1", [["a"], ["b"]], "'jpg_1': expected an image or its path, found ['a']"),
    ],
)
def test_pickapic_values_that_cannot_be_used(tmp_path: Path, column: str, values: list[Any], reason: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", {**pick_rows(2), column: values})
    first = next(iter(read(file)))
    assert isinstance(first, Skipped) and f"{first.origin}: {first.reason}" == f"{file}, row 0: {reason}"


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


# JSON Lines ---------------------------------------------------------------------------------------------------------


def test_jsonl_pairs_and_rankings(tmp_path: Path) -> None:
    write_images(tmp_path / "p", ["a.jpg", "b.jpg", "c.jpg"])
    entries = [
        {"prompt": "x", "chosen": "p/a.jpg", "rejected": "p/b.jpg", "user": 4, "note": "left alone"},
        {"id": "r", "prompt": "y", "images": ["p/a.jpg", "p/b.jpg", "p/c.jpg"], "scores": [1, 3, 2.5],
         "captions": ["A", "B", "C"], "negative_caption": "an owl"},
        {"prompt": "z", "images": ["p/c.jpg"], "scores": [-1]},
    ]  # fmt: skip
    a, b, c = (tmp_path / "p" / name for name in ("a.jpg", "b.jpg", "c.jpg"))
    for file in (write_jsonl(tmp_path / "d.jsonl", entries), tmp_path / "d.json"):
        if file.suffix == ".json":
            file.write_text(json.dumps(entries))
        pair, ranking, single = groups(file)
        assert (pair.candidates, pair.scores, pair.user) == ((a, b), (1.0, 0.0), "4")
        assert (ranking.id, ranking.candidates, ranking.scores) == ("r", (b, c, a), (3.0, 2.5, 1.0))
        assert ranking.captions == ("B", "C", "A") and ranking.negative_caption == "an owl"
        assert (single.candidates, single.scores) == ((c,), (-1.0,))
        assert pair.id != single.id


PAIR = {"prompt": "x", "chosen": "a.jpg", "rejected": "a.jpg"}
ONE = {"prompt": "x", "images": ["a.jpg"], "scores": [1]}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"prompt": "x", "chosen": "a.jpg"}, "expected the keys .*chosen and rejected and prompt, or .*found 'prompt'"),
        ({**PAIR, "prompt": 3}, "'prompt' must be text, found 3"),
        ({**PAIR, "prompt": None}, "no 'prompt'"),
        ({**PAIR, "prompt": " "}, "the prompt is empty"),
        ({**PAIR, "prompt": "\ud800"}, "not valid Unicode"),
        ({**PAIR, "rejected": "gone.jpg"}, r"no such image: gone\.jpg"),
        ({**PAIR, "rejected": None}, "'rejected': an image is missing"),
        ({**PAIR, "negative_caption": 5}, "'negative_caption' must be text, found 5"),
        ({**PAIR, "negative_caption": " "}, "a caption is empty"),
        ({**PAIR, "negative_caption": "\ud800"}, "not valid Unicode"),
        ({**PAIR, "rejected": "x" * 1_000_000}, "base64 text, expected an image's bytes or its path; found 'xxx"),
        ({**PAIR, "rejected": "/9j/4AAQ" * 1000}, "base64 text, expected an image's bytes or its path; found '/9j"),
        ({**PAIR, "rejected": "data:image/png;base64,iVBORw0KGgo="}, "a data URI, expected"),
        ({**PAIR, "rejected": "https://example.com/a.png"}, "an address, expected"),
        ({**PAIR, "rejected": [{"bytes": "x" * 1_000_000}] * 9}, "expected an image or its path, found"),
        ({**PAIR, "rejected": {"a": "x" * 1_000_000}}, "expected an image or its path, found"),
        ({**PAIR, "rejected": "\x1b]0;title\x07.jpg"}, r"^no such image: \\x1b\]0;title\\x07\.jpg$"),
        ({**PAIR, "rejected": "pipe.jpg"}, "not a regular file: pipe.jpg"),
        ({**PAIR, "prompt": ["x" * 1_000_000]}, "'prompt' must be text, found"),
        ({**PAIR, "user": {"x" * 1_000_000: [1] * 1_000}}, "'user' must be text or number, found"),
        ({"x" * 1_000_000: 1}, "expected the keys"),
        ({**ONE, "images": ["a.jpg", None]}, "1 scores"),
        ({**ONE, "images": [None]}, r"'images' \[0\]: an image is missing"),
        ({**ONE, "scores": [1, 2]}, "1 candidates, but 2 scores"),
        ({**ONE, "scores": ["best"]}, r"'scores' \[0\] must be a finite number, found 'best'"),
        ({**ONE, "scores": [float("nan")]}, "must be a finite number, found nan"),
        ({**ONE, "scores": [1e39]}, r"must be a finite number, found 1e\+39"),
        ({**ONE, "scores": [10**400]}, "must be a finite number, found 1000"),
        ({**ONE, "captions": []}, "1 candidates, but 0 captions"),
        ({**ONE, "captions": [2]}, r"'captions' must be a list of texts, found \[2\]"),
        ({**ONE, "captions": [""]}, "a caption is empty"),
        ({**ONE, "user": {}}, "'user' must be text or number, found {}"),
        ({**PAIR, "id": "first"}, "duplicate id 'first'; the first group with it was kept"),
    ],
)  # fmt: skip
def test_jsonl_rows_that_cannot_be_used(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    write_images(tmp_path, ["a.jpg"])
    os.mkfifo(tmp_path / "pipe.jpg")
    file = write_jsonl(tmp_path / "d.jsonl", [{**PAIR, "id": "first"}, entry])
    kept, item = read(file)
    assert isinstance(kept, Group) and isinstance(item, Skipped)
    assert item.origin == f"{file}, line 2" and re.search(reason, item.reason) and len(item.reason) <= 300


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([16777217, 16777216], [16777216.0] * 2),
        ([1.0, 1.0 - 1e-9, 0.5], [1.0, 1.0, 0.5]),
        ([1e-50, 0], [0.0, 0.0]),
        ([1e-50], [0.0]),
        ([7 / 9, 2 / 9], [7 / 9, 2 / 9]),
    ],
)
def test_scores_that_single_precision_cannot_tell_apart_are_equal(
    tmp_path: Path, scores: list[float], expected: list[float]
) -> None:
    """Training is in single precision; a tie there must be one when groups are chosen. 16777217 is 2^24 + 1."""
    write_images(tmp_path, ["a.jpg"])
    (group,) = groups(write_jsonl(tmp_path / "d.jsonl", [{**ONE, "images": ["a.jpg"] * len(scores), "scores": scores}]))
    assert list(group.scores) == expected
    assert group.is_tie == (len(scores) > 1 and len({*expected}) == 1) and group.is_disliked == (expected == [0.0])


@pytest.mark.parametrize("name", ["sub\\a.jpg", "caf\u00e9.jpg", "cafe\u0301.jpg", "sub\\caf\u00e9.jpg"])
def test_paths_of_other_systems(tmp_path: Path, name: str) -> None:
    """Windows' separators; accents that are part of a letter (as Linux and Windows write them), and apart (macOS)."""
    for folder in (tmp_path, tmp_path / "sub"):
        write_images(folder, ["a.jpg", "cafe\u0301.jpg" if folder == tmp_path else "caf\u00e9.jpg"])
    (group,) = groups(write_jsonl(tmp_path / "d.jsonl", [{**PAIR, "chosen": name}]))
    assert group.candidates[0].is_file()


@pytest.mark.parametrize("name", ["lines.json", "a.ndjson", "A.JSONL", "bom.json"])
def test_json_lines_by_other_names(tmp_path: Path, name: str) -> None:
    """`datasets` and pandas write lines into a .json."""
    write_images(tmp_path, ["a.jpg"])
    file = write_jsonl(tmp_path / name, [PAIR, {**PAIR, "prompt": "y"}])
    file.write_bytes(b"\xef\xbb\xbf" * (name == "bom.json") + file.read_bytes())
    assert [(group.id, group.prompt) for group in groups(file)] == [(f"{name}:1", "x"), (f"{name}:2", "y")]


# The registry -------------------------------------------------------------------------------------------------------


def test_formats_are_found_or_listed(tmp_path: Path) -> None:
    (tmp_path / "notes.xyz").write_text("?")
    with pytest.raises(UserError, match=r"no reader recognises this file.*folders, .*jsonl, pairs, pickapic"):
        read(tmp_path / "notes.xyz")
    with pytest.raises(UserError, match="no reader recognises this folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"\\x1b\[2J: no such file or folder"):  # a terminal would obey it
        read(tmp_path / "\x1b[2J")
    for name in ("a.tar.gz", "a.zip"):
        (tmp_path / name).write_bytes(b"?")
        with pytest.raises(UserError, match="It is compressed: unpack it first"):
            read(tmp_path / name)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar.gz").write_bytes(b"?")
    with pytest.raises(UserError, match="Its files are compressed: unpack them first"):
        read(tmp_path / "shards")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "pairs.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(UserError, match=r"no reader recognises this folder.* It holds pairs\.csv: name that file"):
        read(tmp_path / "sub")
    (tmp_path / "disk" / "train").mkdir(parents=True)
    (tmp_path / "disk" / "train" / "dataset_info.json").write_text("{}")
    (tmp_path / "disk" / "train" / "data-00000-of-00001.arrow").write_bytes(b"?")
    with pytest.raises(UserError, match=r"written by save_to_disk of `datasets`: .* to_parquet"):
        read(tmp_path / "disk")
    with pytest.raises(UserError, match="Did you mean 'pickapic'"):
        read(tmp_path / "notes.xyz", "pickapick")
    with pytest.raises(UserError, match="testbed:pairs"):
        read("testbed:pears")


def test_your_own_format(tmp_path: Path) -> None:
    """One function makes a format; order, ids and prompts are seen to for it."""

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
    survey = opening.survey(tmp_path / "a.votes")
    assert (survey.rows, survey.candidates, survey.ties, len(survey.texts)) == (3, {2: 2}, {2: 1}, 2)
    with pytest.raises(UserError, match="there is a data format 'votes' already"):
        register("votes")(lambda path: read_votes(path))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_columns_are_those_that_a_file_has_now(name: str, tmp_path: Path) -> None:
    """They are remembered, for several layouts ask, but not beyond a change of the file within one process."""
    for number, columns in enumerate((["a", "b"], ["c", "d"])):
        values = dict.fromkeys(columns, "1")
        text = ",".join(columns) + "\n1,1\n" if name.endswith("csv") else json.dumps(values) + "\n"
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (number, number))
        assert header(tmp_path / name) == columns
