"""What a run sees of annotations: each caption with its candidate, cached and on the fly, and what the cache keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from t2i_align.data import encode
from t2i_align.data.batch import Batch
from t2i_align.data.encode import Latents
from t2i_align.data.schema import COLUMNS, Group, Skipped
from t2i_align.data.store import TEXTS, Store, read_table, write
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_annotations import CAPTIONED, described, source_of
from tests.data.test_examples import StandIn, colour, contents, jpeg, write_jsonl
from tests.data.test_loader import PAIRS, batches, never, opened

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
