"""What the trainer sees: the same values cached and on the fly, the right groups, and errors before heavy work."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data import readers
from t2i_align.data.loader import PreferenceDataset, open_dataset
from t2i_align.data.schema import Batch, Group
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import (
    StandIn,
    colour,
    jpeg,
    noise_jpeg,
    pick_rows,
    write_images,
    write_jsonl,
    write_parquet,
)

CPU = torch.device("cpu")
PAIRS = Requirements(candidates=2, ties=False)


def never() -> Any:
    pytest.fail("the pipeline was loaded")


def opened(
    tmp_path: Path,
    path: str | Path,
    *,
    needs: Requirements = PAIRS,
    pipeline: Callable[[], Any] = StandIn,
    encoders: str = "e1",
    size: tuple[int, int] = (8, 8),
    **data: Any,
) -> PreferenceDataset:
    return open_dataset(
        DataConfig(path=str(path), **data),
        ModelConfig(path="a model"),
        needs=needs,
        pipeline=pipeline,
        encoder_fingerprint=lambda: encoders,
        size=size,
        cache_root=tmp_path / "cache",
        progress=False,
    )


def batches(source: PreferenceDataset, count: int, batch_size: int = 4, **options: Any) -> list[Batch]:
    options = {"seed": 0, "start_step": 0, "accumulate": 1, "rank": 0, "world": 1, "workers": 0, **options}
    return [source.to_batch(item, CPU) for item in islice(source.loader(batch_size=batch_size, **options), count)]


def keys(found: Sequence[Batch]) -> list[str]:
    return [key for batch in found for key in batch.keys]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Ten pairs: rows 1 and 4 are ties, row 6 has a damaged image."""
    rows = pick_rows(10)
    for row in (1, 4):
        rows["label_0"][row] = rows["label_1"][row] = 0.5
    rows["jpg_1"][6] = rows["jpg_1"][6][:99]
    return write_parquet(tmp_path / "a.parquet", rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_and_on_the_fly_are_the_same(tmp_path: Path, sd_path: Path, workers: int) -> None:
    """A genuine VAE and text encoder: equal keys, scores and values up to rounding to half precision.

    Half precision has 11 significant bits, so the relative error of rounding is at most 2^-11.
    """
    rows = pick_rows(6)
    rows["jpg_0"] = [noise_jpeg(row, side=40 + row) for row in range(6)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    pipeline = pipelines.load(sd_path)
    cached, live = (
        opened(tmp_path, source, pipeline=lambda: pipeline, size=(32, 32), cache=cache) for cache in (True, False)
    )
    assert cached.counts == live.counts == {"groups": 6, "skipped": 0}
    for one, other in zip(batches(cached, 4, 3, workers=workers), batches(live, 4, 3, workers=workers), strict=True):
        assert one.keys == other.keys and one.latents.shape == (3, 2, 4, 16, 16)
        assert torch.equal(one.scores, other.scores)
        assert one.latents.dtype == other.latents.dtype == torch.float32
        assert one.latents.std() > 0.01
        torch.testing.assert_close(one.latents, other.latents, rtol=2**-11, atol=1e-6)
        embeds = one.conditioning["prompt_embeds"], other.conditioning["prompt_embeds"]
        torch.testing.assert_close(*embeds, rtol=2**-11, atol=1e-6)
    torch.testing.assert_close(cached.empty_conditioning(CPU), live.empty_conditioning(CPU), rtol=2**-11, atol=1e-6)
    assert cached.empty_conditioning(CPU)["prompt_embeds"].shape == (1, 16, 16)


def test_ties_and_damage_are_counted_not_lost(tmp_path: Path, pairs: Path) -> None:
    source = opened(tmp_path, pairs)
    assert source.counts == {"groups": 7, "skipped": 1, "ties_left_out": 2}
    assert sorted(keys(batches(source, 7, 1))) == [f"0/{1000 + row}" for row in (0, 2, 3, 5, 7, 8, 9)]
    everything = opened(tmp_path, pairs, needs=Requirements())
    assert everything.counts == {"groups": 9, "skipped": 1}
    assert everything.fingerprint != source.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 1  # what is stored does not depend on the objective
    skipped = json.loads(next((tmp_path / "cache").glob("*/skipped.jsonl")).read_text())
    assert skipped["id"] == "1006" and "row 6" in skipped["origin"]


def test_a_damaged_image_on_the_fly_is_replaced_by_the_next_group(
    tmp_path: Path, pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 6 is found damaged only when it is decoded: then row 7 stands in for it, with its own key."""
    source = opened(tmp_path, pairs, cache=False)
    assert source.counts == {"groups": 8, "skipped": 0, "ties_left_out": 2}
    expected = [f"0/{1000 + row}" for row in (0, 2, 3, 5, 7, 7, 8, 9)]
    assert sorted(keys(batches(source, 8, 1))) == expected == sorted(keys(batches(source, 4, 2)))
    assert "row 6" in caplog.text and "cannot be decoded" in caplog.text
    assert not (tmp_path / "cache").exists()  # nothing is written


def test_a_second_run_encodes_nothing(tmp_path: Path, pairs: Path) -> None:
    first = opened(tmp_path, pairs)
    second = opened(tmp_path, pairs, pipeline=never)
    assert second.fingerprint == first.fingerprint
    assert keys(batches(second, 5)) == keys(batches(first, 5))


def test_what_changes_the_latents_makes_another_cache(tmp_path: Path, pairs: Path) -> None:
    for change in ({"encoders": "e2"}, {"size": (16, 16)}, {"limit": 3}):
        opened(tmp_path, pairs)
        with pytest.raises(pytest.fail.Exception, match="was loaded"):
            opened(tmp_path, pairs, pipeline=never, **change)
    rows = pick_rows(10)
    rows["caption"][0] = "changed"
    write_parquet(pairs, rows)
    with pytest.raises(pytest.fail.Exception, match="was loaded"):
        opened(tmp_path, pairs, pipeline=never)


def test_resume_and_processes_see_the_same_samples(tmp_path: Path, pairs: Path) -> None:
    source = opened(tmp_path, pairs)
    whole = keys(batches(source, 6, batch_size=4))
    assert keys(batches(source, 2, batch_size=4, start_step=4)) == whole[16:]
    ranks = [keys(batches(source, 12, batch_size=1, accumulate=2, world=2, rank=rank)) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(whole)
    assert {key.split("/")[0] for key in whole} == {"0", "1", "2", "3"}  # 24 of 7 a time


def test_the_loader_leaves_the_global_generator_alone(tmp_path: Path, pairs: Path) -> None:
    source = opened(tmp_path, pairs)
    before = torch.random.get_rng_state()
    batches(source, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("cache", [True, False])
def test_a_limit_takes_the_first_usable_groups(tmp_path: Path, pairs: Path, cache: bool) -> None:
    source = opened(tmp_path, pairs, cache=cache, limit=3)
    assert sorted(keys(batches(source, 3, 1))) == ["0/1000", "0/1002", "0/1003"]
    with pytest.raises(UserError, match=r"limit must be a whole number of at least 1"):
        opened(tmp_path, pairs, limit=0)


@pytest.mark.parametrize("cache", [True, False])
def test_workers_leave_interrupts_to_the_run(tmp_path: Path, pairs: Path, cache: bool) -> None:
    """Ctrl-C reaches every process of a terminal's group; batches must still come, or no checkpoint could be saved."""
    source = opened(tmp_path, pairs, cache=cache)
    loader = source.loader(seed=0, start_step=0, batch_size=2, accumulate=1, rank=0, world=1, workers=2)
    found = [next(loader) for _ in range(2)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
    found += [next(loader) for _ in range(20)]
    assert [tuple(item["keys"]) for item in found] == [batch.keys for batch in batches(source, 22, 2)]
    assert all(worker.is_alive() for worker in workers)


# A prepared cache given as the path ---------------------------------------------------------------------------------


def test_a_prepared_folder_is_opened_directly(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = opened(tmp_path, pairs)
    folder = next((tmp_path / "cache").iterdir())
    direct = opened(tmp_path, folder, pipeline=never)
    assert direct.fingerprint == read.fingerprint
    monkeypatch.setenv("HOME", str(folder.parent))
    assert opened(tmp_path, Path("~", folder.name), pipeline=never).fingerprint == read.fingerprint
    limited = opened(tmp_path, folder, pipeline=never, limit=4)
    assert limited.counts == {"groups": 4, "skipped": 1, "ties_left_out": 2, "beyond_the_limit": 3}
    with pytest.raises(
        UserError, match=r"fit model a model: encoders is 'e1' there, 'e2' here; height is 8 there, 16 here"
    ):
        opened(tmp_path, folder, pipeline=never, encoders="e2", size=(16, 8))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        opened(tmp_path, folder, pipeline=never)


# Needs, before anything heavy ---------------------------------------------------------------------------------------


def entries(folder: Path, candidates: Sequence[int], **more: Any) -> Path:
    """A JSONL whose groups have these numbers of candidates."""
    write_images(folder, [f"{n}.jpg" for n in range(3)])
    groups = [{"prompt": "p", "images": [f"{n}.jpg" for n in range(k)], "scores": list(range(k)), **more}
              for k in candidates]  # fmt: skip
    return write_jsonl(folder / "d.jsonl", groups)


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
    rows = {**pick_rows(3), "label_0": [0.5] * 3, "label_1": [0.5] * 3}
    with pytest.raises(UserError, match="no group is left: of 3, 3 are ties"):
        opened(tmp_path, write_parquet(tmp_path / "a.parquet", rows), pipeline=never)


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


def test_only_ties_left_in_a_cache(tmp_path: Path, pairs: Path) -> None:
    """The only group that is no tie has a damaged image, which is found out when it is decoded."""
    rows = {**pick_rows(3), "label_0": [0.5, 1.0, 0.5], "label_1": [0.5, 0.0, 0.5]}
    rows["jpg_0"][1] = b"x"
    with pytest.raises(UserError, match="no group is left: of 2, 2 are ties"):
        opened(tmp_path, write_parquet(tmp_path / "b.parquet", rows))


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
def test_a_limit_stops_the_reading(tmp_path: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READERS", dict(readers.READERS))

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


@pytest.mark.parametrize("cache", [True, False])
def test_a_size_the_vae_cannot_take(tmp_path: Path, pairs: Path, sd_path: Path, cache: bool) -> None:
    with pytest.raises(pipelines.PipelineError, match="multiples of 2"):
        opened(tmp_path, pairs, pipeline=lambda: pipelines.load(sd_path), size=(33, 32), cache=cache)
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


# On the fly ---------------------------------------------------------------------------------------------------------


def test_images_that_change_during_a_run(tmp_path: Path) -> None:
    source = opened(tmp_path, entries(tmp_path, [2, 2]), cache=False)
    batches(source, 1)
    (tmp_path / "0.jpg").write_bytes(jpeg(0)[:50])
    with pytest.raises(UserError, match=r"d\.jsonl: no image around row \d can be decoded"):
        batches(source, 1)


def test_a_folder_whose_name_is_not_unicode(tmp_path: Path) -> None:
    path = entries(tmp_path / os.fsdecode(b"caf\xe9"), [2])
    cached, live = (batches(opened(tmp_path, path, cache=cache), 1, 1)[0] for cache in (True, False))
    torch.testing.assert_close(cached.latents, live.latents, rtol=2**-11, atol=1e-6)


def test_the_bundled_pairs_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: Path) -> None:
    import t2i_align.testbed

    monkeypatch.setattr(t2i_align.testbed, "pairs_path", lambda: pairs, raising=False)
    assert readers.resolve("testbed:pairs") == pairs
    assert opened(tmp_path, Path("testbed:pairs")).counts["groups"] == 7


def test_the_schema_imports_lightly() -> None:
    """Objectives import it, so it must pull in neither readers nor diffusers nor `pipelines`."""
    heavy = ("diffusers", "transformers", "pyarrow", "pipelines", "datasets", "t2i_align.data.readers")
    script = f"import sys, t2i_align.data.schema; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                            cwd=Path(__file__).parents[2])  # fmt: skip
    assert result.stdout.strip() == "[]"


def test_data_does_not_import_pipelines() -> None:
    """A user's own `pipelines` folder must not break reading and opening data."""
    script = "import sys, t2i_align.data.loader; print('pipelines' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                            cwd=Path(__file__).parents[2])  # fmt: skip
    assert result.stdout.strip() == "False"
