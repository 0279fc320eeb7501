"""What an objective needs of its data: groups that are left out, and errors before heavy work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from t2i_align.data import readers
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import colour, jpeg, pick_rows, write_images, write_jsonl, write_parquet
from tests.data.test_loader import PAIRS, batches, entries, keys, never, opened


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("candidates", "needs", "expected"),
    [
        ([1, 1], PAIRS, r"compares 2 candidates of a prompt, but the groups here have 1 candidate \(2 groups\)"),
        (
            [2, 2],
            Requirements(candidates=2, columns=("captions",)),
            "needs 'captions' with each group, but only 0 of 2",
        ),
        (
            [1, 2, 2],
            Requirements(),
            r"same number of candidates, found 1 candidate \(1 groups\), 2 candidates \(2 groups\)",
        ),
    ],
)
def test_needs_that_cannot_be_met(
    tmp_path: Path, candidates: list[int], needs: Requirements, expected: str, cache: bool
) -> None:
    with pytest.raises(UserError, match=expected):
        opened(tmp_path, entries(tmp_path, candidates), needs=needs, pipeline=never, cache=cache)
    assert not (tmp_path / "cache").exists()


def test_only_ties(tmp_path: Path) -> None:
    """Found before the pipeline loads, or, where the only other group has a damaged image, when that is decoded."""
    rows = {**pick_rows(3), "label_0": [0.5] * 3, "label_1": [0.5] * 3}
    with pytest.raises(UserError, match="no group is left: of 3, 3 are ties"):
        opened(tmp_path, write_parquet(tmp_path / "a.parquet", rows), pipeline=never)
    rows |= {"label_0": [0.5, 1.0, 0.5], "label_1": [0.5, 0.0, 0.5]}
    rows["jpg_0"][1] = b"x"
    with pytest.raises(UserError, match="no group is left: of 2, 2 are ties"):
        opened(tmp_path, write_parquet(tmp_path / "b.parquet", rows))


@pytest.mark.parametrize("cache", [True, False])
def test_nothing_left_is_found_before_the_pipeline_loads(tmp_path: Path, cache: bool) -> None:
    """All disliked; then a tie, a sample of score 0 and one that is liked: for pairs too few, for SFT just enough."""
    path = entries(tmp_path, [])
    single, tie = {"prompt": "p", "images": ["0.jpg"]}, {"prompt": "p", "images": ["0.jpg", "1.jpg"], "scores": [1, 1]}
    likes = Requirements(ties=False, likes_only=True)
    write_jsonl(path, [{**single, "scores": [score]} for score in (-1, 0, -3)])
    with pytest.raises(
        UserError,
        match="no group is left: of 3, 0 are ties, 3 are disliked, 0 have fewer than 1 cand",
    ):
        opened(tmp_path, path, needs=likes, pipeline=never, cache=cache)
    write_jsonl(path, [tie, {**single, "scores": [0]}, {**single, "scores": [1]}])
    with pytest.raises(
        UserError,
        match="no group is left: of 3, 1 are ties, 0 are disliked, 2 have fewer than 2 cand",
    ):
        opened(tmp_path, path, pipeline=never, cache=cache)
    assert not (tmp_path / "cache").exists()
    assert opened(tmp_path, path, needs=likes, cache=cache).counts == {
        "groups": 1, "skipped": 0, "ties_left_out": 1, "disliked_left_out": 1,
    }  # fmt: skip


@pytest.mark.parametrize("cache", [True, False])
def test_larger_groups_make_pairs_of_best_and_worst(tmp_path: Path, cache: bool) -> None:
    """Scores 0, 1, 2 in the order of the images: a group of three gives image 2 over 0, a pair 1 over 0."""
    path = entries(tmp_path, [3, 2, 1])
    source = opened(tmp_path, path, cache=cache)
    assert source.counts == {"groups": 2, "skipped": 0, "too_few_candidates": 1}
    batch = batches(source, 1, 2)[0]
    found = dict(zip(batch.keys, zip(batch.scores.tolist(), batch.latents, strict=True), strict=True))
    for key, (best, worst) in {"0/d.jsonl:1": (2, 0), "0/d.jsonl:2": (1, 0)}.items():
        scores, latents = found[key]
        assert scores == [best, worst]
        means = torch.tensor([colour(best), colour(worst)]) / 255
        torch.testing.assert_close(latents.mean((2, 3)), means, rtol=0, atol=3 / 255)
    rankings = opened(tmp_path, path, cache=cache, needs=Requirements(candidates=3))
    assert batches(rankings, 1, 2)[0].latents.shape == (2, 3, 3, 4, 4)
    with pytest.raises(UserError, match="same number of candidates, found 1 candidate"):  # what is stored there
        opened(tmp_path, path, cache=cache, needs=Requirements())


def test_alike_is_asked_only_of_the_groups_that_are_used(tmp_path: Path) -> None:
    """What lies beyond the limit is not; nor are ties, nor single samples that were disliked, where these are out."""
    path = entries(tmp_path, [2, 2])
    tie = {"prompt": "p", "images": ["0.jpg", "1.jpg", "2.jpg"], "scores": [1, 1, 1]}
    write_jsonl(path, [*map(json.loads, path.read_text().splitlines()), tie, {**tie, "scores": [1, 2, 3]}])
    assert opened(tmp_path, path, needs=Requirements(), limit=2).counts["groups"] == 2
    write_jsonl(path, list(map(json.loads, path.read_text().splitlines()))[:3])
    assert opened(tmp_path, path, needs=Requirements(ties=False)).counts["groups"] == 2
    with open(path, "a") as stream:
        stream.write(json.dumps({"prompt": "p", "images": ["0.jpg"], "scores": [-1]}) + "\n")
    assert opened(tmp_path, path, needs=Requirements(ties=False, likes_only=True)).counts["groups"] == 2


@pytest.mark.parametrize("kind", [{"cache": True}, {"cache": False}, {"buckets": True}])
def test_a_limit_stops_the_reading(tmp_path: Path, kind: dict[str, Any]) -> None:
    @readers.register("guarded")
    def read_guarded(path: Path) -> Iterator[Group]:
        for number in range(2):
            yield Group(id=str(number), prompt="p", candidates=(jpeg(0), jpeg(1)), scores=(1.0, 0.0), origin="here")
        pytest.fail("read beyond the limit")

    (tmp_path / "source.any").touch()
    source = opened(tmp_path, tmp_path / "source.any", format="guarded", limit=2, **kind)
    assert source.counts["groups"] == 2


@pytest.mark.parametrize("cache", [True, False])
def test_bad_sources_fail_before_the_pipeline_loads(tmp_path: Path, cache: bool) -> None:
    """A path that leaves the folder in the last row is found before the first image is encoded."""
    path = entries(tmp_path, [2, 2])
    with open(path, "a") as stream:
        stream.write(json.dumps({"prompt": "p", "chosen": "0.jpg", "rejected": "../1.jpg"}) + "\n")
    with pytest.raises(UserError, match=r"line 3: '\.\./1\.jpg' leads outside"):
        opened(tmp_path, path, pipeline=never, cache=cache)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(UserError, match="is empty"):
        opened(tmp_path, empty, pipeline=never, cache=cache)
    unlabelled = {**pick_rows(2), "has_label": [False, False]}
    with pytest.raises(UserError, match=r"no usable group among 2 rows\. First reasons: .*not labelled"):
        opened(tmp_path, write_parquet(tmp_path / "b.parquet", unlabelled), pipeline=never, cache=cache)
    assert not (tmp_path / "cache").exists()


LONG = "a long description " * 40
NEGATIVE = Requirements(likes_only=True, columns=("negative_caption",))
CAPTIONS = Requirements(candidates=2, ties=False, columns=("captions",))


@pytest.mark.parametrize("data", [{"cache": True}, {"cache": False}, {"stream": 5}])
@pytest.mark.parametrize(
    ("needs", "kept", "alike"),
    [
        (
            NEGATIVE,
            {"negative_caption": "an owl"},
            [{"negative_caption": f"{LONG} an owl"}, {"negative_caption": LONG.upper()}],
        ),
        (CAPTIONS, {"captions": [LONG, LONG]}, [{"captions": [f"{LONG} a fox", f"{LONG} an owl"]}]),
    ],
)
def test_texts_that_the_encoder_reads_alike_are_left_out(
    tmp_path: Path, sd_path: Path, caplog: pytest.LogCaptureFixture, needs: Requirements, kept: Any, alike: Any,
    data: dict[str, Any],
) -> None:  # fmt: skip
    """Texts that differ beyond the encoder's limit or in case alone teach nothing; candidates may share a caption."""
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    group = {"prompt": LONG, "images": ["0.jpg", "1.jpg"], "scores": [1, 0]}
    groups = [{**group, **columns} for columns in (*alike, kept)]
    opening: dict[str, Any] = {"needs": needs, "pipeline": lambda: pipelines.load(sd_path), "size": (32, 32), **data}
    source = opened(tmp_path, write_jsonl(tmp_path / "d.jsonl", groups), **opening)
    assert set(keys(batches(source, 3, 1))) == {f"{epoch}/d.jsonl:{len(groups)}" for epoch in range(3)}
    texts = {LONG, *(text for entry in groups for text in entry.get("captions", [entry.get("negative_caption")]))}
    longer = sum(LONG in text or LONG.upper() == text for text in texts)
    assert f"{longer} of {len(texts)} texts are longer than 16 tokens (tokenizer)" in caplog.text
    if data.get("cache"):
        assert source.counts["texts_alike_left_out"] == len(alike)
    with pytest.raises(UserError, match="no group"):
        only = opened(tmp_path, write_jsonl(tmp_path / "alike.jsonl", groups[:-1]), **opening)
        batches(only, 1, 1)
