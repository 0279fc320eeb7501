"""Annotations: what is added reaches the right group and the right candidate, cached and on the fly, or is an error."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_align.config import DataConfig
from t2i_align.data import readers
from t2i_align.data.annotations import Annotations
from t2i_align.data.schema import COLUMNS, Column, Group, Skipped
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import StandIn, pick_rows, write_images, write_jsonl, write_parquet
from tests.data.test_loader import batches, never, opened

CAPTIONED = Requirements(candidates=2, ties=False, columns=("captions",))
NEGATIVE = Requirements(columns=("negative_caption",))


def source_of(folder: Path, scores: list[list[float]], **more: Any) -> Path:
    """A JSONL with groups g0, g1, ... of these scores. Candidate c of group g is image 10 g + c."""
    entries = []
    for g, values in enumerate(scores):
        names = [f"{10 * g + c}.png" for c in range(len(values))]
        entries.append({"id": f"g{g}", "prompt": f"prompt {g}", "images": names, "scores": values, **more})
    write_images(folder, [f"{n}.png" for n in range(10 * len(scores))])
    return write_jsonl(folder / "d.jsonl", entries)


def described(scores: list[list[float]], *columns: str) -> list[dict[str, Any]]:
    """Annotations of all groups, in which a caption names its image and a negative caption its group."""
    values = [
        {"captions": [f"{10 * g + c} image" for c in range(len(row))], "negative_caption": f"not {g}",
         "user": f"user {g}", "scores": [float(c) for c in range(len(row))]} for g, row in enumerate(scores)
    ]  # fmt: skip
    return [{"id": f"g{g}", **{name: row[name] for name in columns}} for g, row in enumerate(values)]


def groups_of(path: Path, *sidecars: Path) -> dict[str, Group | Skipped]:
    return {item.id: item for item in readers.read(path, annotations=Annotations.load(sidecars))}


# Reading sidecar files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"captions": ["a"]}, r"expected 'id' with any of 'scores', 'captions', .*; found 'captions'"),
        ({"id": "a"}, r"expected 'id' with any of .*; found 'id'"),
        ({"id": "a", "caption": "x"}, r"expected 'id' with any of .*; found 'id', 'caption'"),
        ({"id": None, "scores": [1]}, "'id' must be text or number, found None"),
        ({"id": True, "scores": [1]}, "'id' must be text or number, found True"),
        ({"id": [1], "scores": [1]}, r"'id' must be text or number, found \[1\]"),
        ({"id": "a", "scores": 1}, "'scores' must be a list, found 1"),
        ({"id": "a", "scores": ["1", "2"]}, "'scores' must be a list of finite numbers, found"),
        ({"id": "a", "scores": [True, 2]}, "'scores' must be a list of finite numbers, found"),
        ({"id": "a", "scores": [None, 2]}, "'scores' must be a list of finite numbers, found"),
        ({"id": "a", "scores": [1, float("nan")]}, "'scores' must be a list of finite numbers, found"),
        ({"id": "a", "scores": [1, float("-inf")]}, "'scores' must be a list of finite numbers, found"),
        ({"id": "a", "scores": [1, 10**400]}, "'scores' must be a list of finite numbers, found"),
        ({"id": "a", "captions": "one text"}, "'captions' must be a list, found 'one text'"),
        ({"id": "a", "captions": ["one", 2]}, "'captions' must be a list of texts"),
        ({"id": "a", "negative_caption": ["a"]}, "'negative_caption' must be text, found"),
        ({"id": "a", "user": {}}, r"'user' must be text or number, found {}"),
        ({"id": "first", "user": "x"}, r"the id 'first' is there already: .*s\.jsonl, line 1"),
        ([], "expected an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, expected: str) -> None:
    file = write_jsonl(tmp_path / "s.jsonl", [{"id": "first", "scores": [1, 2]}, row])
    with pytest.raises(UserError, match=rf"s\.jsonl, line 2: {expected}"):
        Annotations.load([file])


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "cut.jsonl").write_text('{"id": "a", "scores": [1, 2')
    (tmp_path / "a.csv").write_text("id,scores")
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    pq.write_table(pa.table({"scores": [[1.0]]}), tmp_path / "no_id.parquet")
    pq.write_table(pa.table({"id": ["a", "b"], "scores": [[1.0], [float("nan")]]}), tmp_path / "nan.parquet")
    pq.write_table(pa.table({"id": ["a"], "scores": ["1"]}), tmp_path / "text.parquet")
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "user": pa.array([], pa.string())}), tmp_path / "0.parquet"
    )
    for name, expected in {
        "gone.jsonl": "no such file",
        "y" * 300: "no such file",  # too long to be one
        "": "no such file",  # a folder
        "a.csv": r"expected a \.jsonl, \.json or \.parquet file",
        "empty.jsonl": "the file is empty",
        "blank.jsonl": "no rows in it",
        "cut.jsonl": "line 1: not valid JSON",
        "bad.parquet": "not a readable parquet",
        "no_id.parquet": "row 0: expected 'id' with any of .*; found 'scores'",
        "nan.parquet": r"row 1: 'scores' must be a list of finite numbers",
        "text.parquet": "row 0: 'scores' must be a list, found '1'",
        "0.parquet": "no rows in it",
    }.items():
        with pytest.raises(UserError, match=rf"{name}.*{expected}"):
            Annotations.load([tmp_path / name])


def test_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    """Ids may be integers in either; a null is a value left out; other keys are left alone."""
    lines = write_jsonl(
        tmp_path / "s.jsonl", [{"id": 5, "scores": [1, 2], "scorer": "clip"}, {"id": "b", "scores": None, "user": 7}]
    )
    table = pa.table({"id": ["5", "b"], "scores": [[1.0, 2.0], None], "user": [None, 7], "scorer": ["clip", "x"]})
    pq.write_table(table, tmp_path / "s.parquet")
    values = [
        {group: {name: value.value for name, value in row.items()} for group, row in result.entries.items()}
        for result in (Annotations.load([lines]), Annotations.load([tmp_path / "s.parquet"]))
    ]
    assert values[0] == values[1] == {"5": {"scores": (1.0, 2.0)}, "b": {"user": "7"}}


def test_two_files_may_add_to_one_group_but_not_the_same(tmp_path: Path) -> None:
    path = source_of(tmp_path, [[1, 0]])
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "g0", "captions": ["a", "b"]}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"id": "g0", "scores": [1, 2]}])
    three = write_jsonl(tmp_path / "three.jsonl", [{"id": "g0", "user": "u", "scores": [1, 2]}])
    group = groups_of(path, one, two)["g0"]
    assert isinstance(group, Group) and (group.captions, group.scores) == (("b", "a"), (2.0, 1.0))
    with pytest.raises(UserError, match=r"three\.jsonl, line 1: 'scores' of id 'g0' is given already: .*two\.jsonl"):
        Annotations.load([one, two, three])


# Groups with annotations --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_captions_and_scores_stay_with_their_candidate(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever the order of either scores: sorted by what counts, ties in the source's order, each with its caption."""
    number = st.integers(-2, 2).map(float)
    rows = data.draw(st.lists(st.lists(number, min_size=1, max_size=5), min_size=1, max_size=4))
    new = [data.draw(st.lists(number, min_size=len(row), max_size=len(row))) for row in rows]
    rescored = data.draw(st.booleans())
    folder = tmp_path_factory.mktemp("order")
    path = source_of(folder, rows)
    captions = write_jsonl(folder / "captions.jsonl", described(rows, "captions", "negative_caption"))
    scores = write_jsonl(folder / "scores.jsonl", [{"id": f"g{g}", "scores": row} for g, row in enumerate(new)])
    result = groups_of(path, captions, *([scores] if rescored else []))
    for g, row in enumerate(new if rescored else rows):
        group = result[f"g{g}"]
        assert isinstance(group, Group)
        order = [c for score in sorted(set(row), reverse=True) for c in range(len(row)) if row[c] == score]
        assert [candidate.stem for candidate in group.candidates if isinstance(candidate, Path)] == [
            str(10 * g + c) for c in order
        ]
        assert group.captions == tuple(f"{10 * g + c} image" for c in order)
        assert group.scores == tuple(row[c] for c in order)
        assert group.negative_caption == f"not {g}"
    unsorted = list(readers.read(path, best_first=False))
    assert [item.scores for item in unsorted if isinstance(item, Group)] == [tuple(row) for row in rows]


def test_the_bundled_pairs_take_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the columns: row 1 prefers jpg_1, so its captions change places. Ids are integers in both."""
    import t2i_align.testbed

    path = write_parquet(tmp_path / "a.parquet", pick_rows(3))
    monkeypatch.setattr(t2i_align.testbed, "pairs_path", lambda: path)
    rows = [{"id": 1000 + row, "captions": ["0", "1"], "negative_caption": "n"} for row in range(3)]
    sidecar = write_jsonl(tmp_path / "s.jsonl", rows)
    result = groups_of(Path("testbed:pairs"), sidecar)
    assert [getattr(item, "captions", None) for item in result.values()] == [("0", "1"), ("1", "0"), ("0", "1")]
    source = opened(tmp_path, Path("testbed:pairs"), needs=NEGATIVE, annotations=[str(sidecar)])
    batch = batches(source, 1, 3)[0]
    assert batch.negative_caption is not None
    assert torch.equal(batch.negative_caption["embeds"], StandIn().encode_prompts(["n"] * 3)["embeds"])


def test_a_group_without_an_entry(tmp_path: Path) -> None:
    """A source's own caption is kept; a missing value skips the group, and so do the source's scores."""
    path = source_of(tmp_path, [[0, 1], [0, 1], [0, 1]], captions=["own 0", "own 1"])
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", described([[0, 1], [0, 1]], name))
             for name in ("captions", "negative_caption", "scores")}  # fmt: skip
    kept = groups_of(path, files["captions"])["g2"]
    assert isinstance(kept, Group) and kept.captions == ("own 1", "own 0")
    for name in ("negative_caption", "scores"):
        result = groups_of(path, files["captions"], files[name])
        assert isinstance(result["g1"], Group)
        skipped = result["g2"]
        assert isinstance(skipped, Skipped)
        assert skipped.reason == f"no '{name}' for it in {files[name]}" and "line 3" in skipped.origin


@pytest.mark.parametrize("cache", [True, False])
def test_skips_are_recorded_and_groups_are_few(tmp_path: Path, cache: bool, caplog: pytest.LogCaptureFixture) -> None:
    scores: list[list[float]] = [[1, 0]] * 4
    path = source_of(tmp_path, scores)
    sidecar = write_jsonl(tmp_path / "s.jsonl", described(scores, "captions")[1:3])
    source = opened(tmp_path, path, needs=CAPTIONED, cache=cache, annotations=[str(sidecar)])
    assert source.counts == {"groups": 2, "skipped": 2}
    reason = f"no 'captions' for it in {sidecar}"
    if not cache:
        assert "2 rows cannot be used" in caplog.text and caplog.text.count(reason) == 2
        return
    lines = next((tmp_path / "cache").glob("*/skipped.jsonl")).read_text().splitlines()
    assert [(json.loads(line)["id"], json.loads(line)["reason"]) for line in lines] == [("g0", reason), ("g3", reason)]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["captions", "scores"])
def test_one_value_a_candidate_before_the_pipeline_loads(tmp_path: Path, cache: bool, name: str) -> None:
    rows = described([[1, 0], [1, 0, 0]], name)
    sidecar = write_jsonl(tmp_path / "s.jsonl", rows)
    path = source_of(tmp_path, [[1, 0], [1, 0]])
    expected = rf"s\.jsonl, line 2: '{name}' must have one value for each of the 2 candidates of group 'g1' .*found 3"
    with pytest.raises(UserError, match=expected):
        opened(tmp_path, path, pipeline=never, cache=cache, annotations=[str(sidecar)])
    assert not (tmp_path / "cache").exists()


def test_a_second_group_of_the_same_id_takes_no_annotation(tmp_path: Path) -> None:
    """It is left out for its id, whatever its number of candidates."""
    path = source_of(tmp_path, [[1, 0], [0, 1, 2]])
    path.write_text(path.read_text().replace("g1", "g0"))
    sidecar = write_jsonl(tmp_path / "s.jsonl", [{"id": "g0", "scores": [3, 4]}])
    first, second = readers.read(path, annotations=Annotations.load([sidecar]))
    assert isinstance(first, Group) and first.scores == (4.0, 3.0)
    assert isinstance(second, Skipped) and "duplicate id 'g0'" in second.reason


@pytest.mark.parametrize("cache", [True, False])
def test_annotations_of_nothing_are_reported(tmp_path: Path, cache: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Two ids are in no row. One is of a row that is skipped, and one of a group: these are as they should be."""
    rows = pick_rows(2)
    rows["has_label"][1] = False
    path = write_parquet(tmp_path / "a.parquet", rows)
    ids = ["x", "1000", "1001", "y"]
    sidecar = write_jsonl(tmp_path / "s.jsonl", [{"id": name, "negative_caption": "n"} for name in ids])
    with caplog.at_level(logging.WARNING, "t2i_align"):
        opened(tmp_path, path, cache=cache, annotations=[str(sidecar)])
    assert [text for record in caplog.records if "annotations belong" in (text := record.getMessage())] == [
        f"{path}: 2 of 4 annotations belong to no group of this source, such as that of id 'x'"
    ]
    only = write_jsonl(tmp_path / "only.jsonl", [{"id": "a.parquet:0", "scores": [1, 0]}])
    with pytest.raises(UserError, match=r"no usable group among 2 rows\. .*no 'scores' for it in .*only\.jsonl"):
        opened(tmp_path, path, pipeline=never, cache=cache, annotations=[str(only)])


def test_home_in_names_of_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/fox")
    assert DataConfig(annotations=["~/a.jsonl", "b.parquet"]).annotations == ["/home/fox/a.jsonl", "b.parquet"]


# The table of columns -----------------------------------------------------------------------------------------------


def test_a_new_column_is_one_line_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a row and from annotations to a group, in its order; refused where it has another type."""
    monkeypatch.setitem(COLUMNS, "focus", Column("focus", "double", per_candidate=True))
    monkeypatch.setitem(COLUMNS, "style", Column("style", text=True))
    path = source_of(tmp_path, [[0, 1], [0, 1], [0, 1]], focus=[0.25, 0.75], style="ink")
    group = groups_of(path)["g0"]
    assert isinstance(group, Group) and group.columns == {"focus": (0.75, 0.25), "style": "ink"}
    assert group.texts == (group.prompt, "ink") and "focus" in group.present
    annotated = groups_of(path, write_jsonl(tmp_path / "s.jsonl", [{"id": f"g{n}", "focus": [1, n]} for n in range(3)]))
    assert [group.focus for group in annotated.values()] == [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)]
    refused = groups_of(source_of(tmp_path, [[0, 1]], focus=["far", "near"]))["g0"]
    assert isinstance(refused, Skipped) and refused.reason.startswith("'focus' must be a list of finite numbers, found")
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"path: {path.name}\ncolumns: {{candidates: images, scores: scores, id: id, style: prompt}}\n")
    source_of(tmp_path, [[0, 1]])
    (described,) = groups_of(spec).values()
    assert isinstance(described, Group) and described.style == described.prompt


@pytest.mark.parametrize("cache", [True, False])
def test_a_new_column_reaches_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool) -> None:
    """Of a text its conditioning, of other columns their values; one per candidate is sorted and paired with these."""
    monkeypatch.setitem(COLUMNS, "focus", Column("focus", "double", per_candidate=True))
    monkeypatch.setitem(COLUMNS, "style", Column("style", text=True))
    path = source_of(tmp_path, [[0, 1, 2]], focus=[0.25, 0.5, 0.75], style="ink", user="u")
    needs = Requirements(candidates=2, columns=("focus", "style", "user"))
    (batch,) = batches(opened(tmp_path, path, needs=needs, cache=cache), 1, 1)
    assert [*map(list, batch.focus)] == [[0.75, 0.25]] and batch.user == ["u"]
    assert torch.equal(batch.style["embeds"], StandIn().encode_prompts(["ink"])["embeds"])
    with pytest.raises(UserError, match="needs 'focus' with each group, but only 0 of 1"):
        opened(tmp_path, source_of(tmp_path, [[0, 1]], style="ink", user="u"), needs=needs, cache=cache)
