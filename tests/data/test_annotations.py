"""Annotations: what is added reaches the right group and the right candidate, cached and on the fly, or is an error."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines
from t2i_align.config import DataConfig
from t2i_align.data import encode, readers
from t2i_align.data.annotations import Annotations
from t2i_align.data.encode import Latents
from t2i_align.data.schema import COLUMNS, Batch, Column, Group, Skipped
from t2i_align.data.store import TEXTS, Store, read_table, write
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import (
    StandIn,
    colour,
    contents,
    jpeg,
    pick_rows,
    write_images,
    write_jsonl,
    write_parquet,
)
from tests.data.test_loader import PAIRS, batches, never, opened

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


# What a run sees ----------------------------------------------------------------------------------------------------

SCORES: list[list[float]] = [[0, 2, 1], [1, 0], [0, 1], [5, 4]]
ENDS = {"g0": (1, 0), "g1": (10, 11), "g2": (21, 20), "g3": (30, 31)}  # best and worst image


def expect(batch: Batch, pipeline: Any, tolerance: dict[str, float]) -> None:
    """The best and the worst image of each group, each with its own caption, and the group's negative caption."""
    assert batch.captions is not None and batch.negative_caption is not None
    images = [ENDS[key.split("/")[1]] for key in batch.keys]
    wanted = pipeline.encode_prompts([f"{n} image" for pair in images for n in pair])
    negative = pipeline.encode_prompts([f"not {pair[0] // 10}" for pair in images])
    prompts = pipeline.encode_prompts([f"prompt {pair[0] // 10}" for pair in images])
    for name, tensor in wanted.items():
        result = batch.captions[name]
        assert result.shape == (len(images), 2, *tensor.shape[1:])
        assert result.dtype == tensor.dtype
        torch.testing.assert_close(result.flatten(0, 1), tensor, **tolerance)
        torch.testing.assert_close(batch.negative_caption[name], negative[name], **tolerance)
        torch.testing.assert_close(batch.conditioning[name], prompts[name], **tolerance)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_candidate_has_its_own_caption(tmp_path: Path, cache: bool, workers: int) -> None:
    path = source_of(tmp_path, SCORES)
    sidecar = write_jsonl(tmp_path / "s.jsonl", described(SCORES, "captions", "negative_caption"))
    needs = Requirements(candidates=2, ties=False, columns=("captions", "negative_caption"))
    source = opened(tmp_path, path, needs=needs, cache=cache, annotations=[str(sidecar)])
    for batch in batches(source, 4, 3, workers=workers):
        expect(batch, StandIn(), {"rtol": 0, "atol": 0})
        for key, pair in zip(batch.keys, batch.latents, strict=True):
            best, worst = ENDS[key.split("/")[1]]
            means = torch.tensor([colour(best), colour(worst)]) / 255
            torch.testing.assert_close(pair.mean((2, 3)), means, rtol=0, atol=3 / 255)


@pytest.mark.parametrize("cache", [True, False])
def test_captions_under_a_genuine_text_encoder(tmp_path: Path, sd_path: Path, cache: bool) -> None:
    """Half precision has 11 significant bits, so the relative error of rounding is at most 2^-11."""
    path = source_of(tmp_path, SCORES)
    sidecar = write_jsonl(tmp_path / "s.jsonl", described(SCORES, "captions", "negative_caption"))
    pipeline = pipelines.load(sd_path)
    needs = Requirements(candidates=2, columns=("captions", "negative_caption"))
    source = opened(tmp_path, path, needs=needs, pipeline=lambda: pipeline, size=(32, 32), cache=cache,
                    annotations=[str(sidecar)])  # fmt: skip
    expect(batches(source, 1)[0], pipeline, {"rtol": 2**-11, "atol": 1e-5})


@pytest.mark.parametrize("cache", [True, False])
def test_lists_have_one_caption_per_candidate(tmp_path: Path, cache: bool) -> None:
    path = source_of(tmp_path, [[0, 2, 1], [2, 0, 1]])
    sidecar = write_jsonl(tmp_path / "s.jsonl", described([[0] * 3] * 2, "captions"))
    needs = Requirements(candidates=2, lists=True, columns=("captions",))
    batch = batches(opened(tmp_path, path, needs=needs, cache=cache, annotations=[str(sidecar)]), 1, 2)[0]
    orders = {"0/g0": (1, 2, 0), "0/g1": (10, 12, 11)}
    assert batch.captions is not None
    for key, embeds in zip(batch.keys, batch.captions["embeds"], strict=True):
        assert torch.equal(embeds, StandIn().encode_prompts([f"{n} image" for n in orders[key]])["embeds"])
    pairs = source_of(tmp_path, [[0, 1, 2], [0, 1]])
    with pytest.raises(UserError, match="same number of candidates, found 2 candidates"):
        opened(tmp_path, pairs, needs=Requirements(candidates=2, lists=True), pipeline=never, cache=cache)


@pytest.mark.parametrize("cache", [True, False])
def test_batches_have_only_the_required_columns(tmp_path: Path, cache: bool) -> None:
    """One cache serves every objective; the batches of one that asks for no captions are as they were without any."""
    path = source_of(tmp_path, SCORES)
    sidecar = write_jsonl(tmp_path / "s.jsonl", described(SCORES, "captions", "negative_caption", "user"))
    options: dict[str, Any] = {"cache": cache, "annotations": [str(sidecar)]}
    plain = batches(opened(tmp_path, path, cache=cache), 3)
    for batch, other in zip(batches(opened(tmp_path, path, **options), 3), plain, strict=True):
        assert batch.captions is None and batch.negative_caption is None
        assert batch.keys == other.keys and torch.equal(batch.latents, other.latents)
        torch.testing.assert_close(batch.conditioning, other.conditioning, rtol=0, atol=0)
    for needs in (CAPTIONED, Requirements(candidates=2, columns=("negative_caption",))):
        again = StandIn if not cache else never
        batch = batches(opened(tmp_path, path, needs=needs, pipeline=again, **options), 1)[0]
        assert (batch.captions is not None, batch.negative_caption is not None) == (
            "captions" in needs.columns,
            "negative_caption" in needs.columns,
        )
    if cache:
        assert len(list((tmp_path / "cache").iterdir())) == 2  # one with the annotations, one without


def test_each_text_is_encoded_once(tmp_path: Path) -> None:
    """Also one that is a prompt here and a caption there."""
    scores: list[list[float]] = [[1, 0]] * 3
    rows = [{"id": f"g{g}", "captions": ["a fox", f"prompt {g}"], "negative_caption": "an owl"} for g in range(3)]
    sidecar = write_jsonl(tmp_path / "s.jsonl", rows)
    pipeline = StandIn()
    source = opened(tmp_path, source_of(tmp_path, scores), pipeline=lambda: pipeline, annotations=[str(sidecar)])
    assert sorted(pipeline.prompts) == sorted(["", "", "a fox", "an owl", "prompt 0", "prompt 1", "prompt 2"])
    assert source.store.manifest["counts"]["texts"] == 6
    assert source.store.manifest["counts"]["columns"] == {
        "scores": 0, **dict.fromkeys(COLUMNS, 0), "captions": 3, "negative_caption": 3,
    }  # fmt: skip


def test_annotated_scores_decide_order_and_ties(tmp_path: Path) -> None:
    path = source_of(tmp_path, [[1, 0], [1, 1], [1, 0]])
    rows = [[0.2, 0.3], [0.25, 0.1], [0.5, 0.5]]
    sidecar = write_jsonl(tmp_path / "s.jsonl", [{"id": f"g{g}", "scores": row} for g, row in enumerate(rows)])
    for cache in (True, False):
        source = opened(tmp_path, path, cache=cache, annotations=[str(sidecar)])
        assert source.counts == {"groups": 2, "skipped": 0, "ties_left_out": 1}
        batch = batches(source, 1, 2)[0]
        assert dict(zip(batch.keys, batch.scores.tolist(), strict=True)) == {
            "0/g0": pytest.approx([0.3, 0.2]),
            "0/g1": pytest.approx([0.25, 0.1]),
        }
        assert source.stats.score_range == (0.1, 0.3)


@pytest.mark.parametrize("cache", [True, False])
def test_the_fingerprint_follows_the_annotations(tmp_path: Path, cache: bool) -> None:
    path = source_of(tmp_path, SCORES)
    one = write_jsonl(tmp_path / "one.jsonl", described(SCORES, "captions"))
    two = write_jsonl(tmp_path / "two.jsonl", described(SCORES, "scores"))
    options: dict[str, Any] = {"cache": cache, "needs": CAPTIONED}
    first = opened(tmp_path, path, annotations=[str(one), str(two)], **options).fingerprint
    assert opened(tmp_path, path, annotations=[str(two), str(one)], **options).fingerprint == first
    write_jsonl(one, [{**row, "captions": [*row["captions"][:-1], "x"]} for row in described(SCORES, "captions")])
    assert opened(tmp_path, path, annotations=[str(one), str(two)], **options).fingerprint != first
    with pytest.raises(UserError, match=r"data\.annotations: .*gone\.jsonl: no such file"):
        opened(tmp_path, path, pipeline=never, annotations=[str(tmp_path / "gone.jsonl")], **options)


def test_a_finished_cache_takes_no_annotations(tmp_path: Path) -> None:
    path = source_of(tmp_path, SCORES)
    sidecar = write_jsonl(tmp_path / "s.jsonl", described(SCORES, "captions"))
    opened(tmp_path, path, annotations=[str(sidecar)])
    folder = next((tmp_path / "cache").iterdir())
    with pytest.raises(UserError, match=r"Name the source itself in data\.path"):
        opened(tmp_path, folder, pipeline=never, annotations=[str(sidecar)])
    batch = batches(opened(tmp_path, folder, pipeline=never, needs=CAPTIONED), 1)[0]
    assert batch.captions is not None
    texts = [f"{n} image" for key in batch.keys for n in ENDS[key.split("/")[1]]]
    assert torch.equal(batch.captions["embeds"].flatten(0, 1), StandIn().encode_prompts(texts)["embeds"])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("captions", r"needs 'captions' with each group, but only 0 of 4 .*`t2i-align caption` makes it"),
        ("negative_caption", r"needs 'negative_caption' .*`t2i-align perturb` makes it: .* data\.annotations"),
        ("scores", r"needs 'scores' that are more than labels .*`t2i-align relabel` makes it"),
        ("user", r"needs 'user' with each group, but only 0 of 4 groups have it\.$"),
    ],
)
def test_missing_column_names_the_command_that_makes_it(
    tmp_path: Path, cache: bool, column: str, expected: str
) -> None:
    labels: list[list[float]] = [[1, 0], [0, 1], [0.5, 0.5], [1, 0]]
    path = source_of(tmp_path, labels)
    needs = Requirements(candidates=2, columns=(column,))
    with pytest.raises(UserError, match=expected):
        opened(tmp_path, path, needs=needs, pipeline=never, cache=cache)
    opened(tmp_path, path, cache=cache)  # prepared for another objective, it is missing as before
    with pytest.raises(UserError, match=expected):
        opened(tmp_path, path, needs=needs, cache=cache)
    rows = described(labels, column)
    if column == "scores":  # one of a scorer's numbers that no label could be is enough
        rows[1]["scores"] = [0.25, 0.0]
    sidecar = write_jsonl(tmp_path / "s.jsonl", rows)
    assert opened(tmp_path, path, needs=needs, cache=cache, annotations=[str(sidecar)]).counts["groups"] == 4


def test_home_in_names_of_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/fox")
    assert DataConfig(annotations=["~/a.jsonl", "b.parquet"]).annotations == ["/home/fox/a.jsonl", "b.parquet"]


# The cache ----------------------------------------------------------------------------------------------------------


def captioned(count: int) -> list[Group | Skipped]:
    """Groups of which every other one has captions, and every third a negative caption."""
    return [
        Group(id=f"g{n}", prompt=f"p{n % 3}", candidates=(jpeg(2 * n), jpeg(2 * n + 1)), scores=(1.0, 0.0), origin="x",
              columns={**({"captions": (f"c{n}", "common")} if n % 2 else {}),
                       **({"negative_caption": f"p{n}"} if n % 3 == 2 else {})})
        for n in range(count)
    ]  # fmt: skip


def make(out: Path, pipeline: StandIn | None = None, count: int = 12) -> None:
    encoder = Latents(pipeline or StandIn(), [(8, 8)], batch_size=3)  # type: ignore[arg-type]
    write(captioned(count), encoder, out, fingerprint={"source": "a"}, progress=False)


@pytest.mark.parametrize("after", [1, 9, 14, 23])
def test_an_interrupted_prepare_with_captions_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(encode, "MAX_ROWS_PER_SHARD", 4)
    make(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped in the middle"):
        make(tmp_path / "out", StandIn(fail_after=after))
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    result = Store(tmp_path / "out")
    texts = [text for shard in range(3) for text in _prompts(result.path / f"shard-{shard:05d}")]
    assert len(texts) == len(set(texts)) == 1 + 3 + 6 + 1 + 3  # "", p0-p2, c1-c11, common, p5, p8, p11 (p2 is there)
    for number in range(12):
        captions, negative, prompt = (
            result.index[name][number].as_py() for name in ("captions", "negative_caption", "prompt")
        )
        assert [texts[n] for n in captions] == ([f"c{number}", "common"] if number % 2 else [])
        assert (texts[negative] if negative >= 0 else None) == (f"p{number}" if number % 3 == 2 else None)
        assert texts[prompt] == f"p{number % 3}"


def _prompts(shard: Path) -> list[str]:
    result: list[str] = read_table(shard / TEXTS)["text"].to_pylist()
    return result


def test_a_caption_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    class Overflows(StandIn):
        def encode_prompts(self, prompts: Any) -> dict[str, torch.Tensor]:
            encoded = super().encode_prompts(prompts)
            for row, prompt in enumerate(prompts):
                encoded["embeds"][row] *= 1e9 if prompt in ("c3", "p5") else 1
            return encoded

    make(tmp_path / "out", Overflows(), count=6)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in skipped] == [
        ("g3", "the embedding of 'c3' is not finite in half precision"),
        ("g5", "the embedding of 'p5' is not finite in half precision"),
    ]
    assert len(Store(tmp_path / "out")) == 4


def test_space_for_captions_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 pairs of 3 x 4 x 4 halves and 1 + 4 + 8 + 1 texts of 9 halves and 8 bytes: 4 * 2 * 96 + 14 * 26 = 1132."""
    scores: list[list[float]] = [[1, 0]] * 4
    path = source_of(tmp_path, scores)
    rows = [{**row, "negative_caption": "none"} for row in described(scores, "captions")]
    sidecar = write_jsonl(tmp_path / "s.jsonl", rows)
    for free, fits in ((1131, False), (1132, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        if fits:
            assert opened(tmp_path, path, annotations=[str(sidecar)]).counts["groups"] == 4
        else:
            with pytest.raises(UserError, match="the cache needs about"):
                opened(tmp_path, path, annotations=[str(sidecar)])


@pytest.mark.parametrize("cache", [True, False])
def test_facts_are_of_the_chosen_groups(tmp_path: Path, cache: bool) -> None:
    path = source_of(tmp_path, [[0, 2, 1], [9, 9], [-3, 4], [7, 8]])
    assert opened(tmp_path, path, cache=cache, needs=PAIRS).stats.score_range == (-3.0, 8.0)
    assert opened(tmp_path, path, cache=cache, needs=Requirements(candidates=2)).stats.score_range == (-3.0, 9.0)
    assert opened(tmp_path, path, cache=cache, needs=PAIRS, limit=1).stats.score_range == (0.0, 2.0)


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
