"""What the trainer sees: the same values cached and on the fly, the right groups, and errors before heavy work."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data import readers
from t2i_align.data.batch import Batch
from t2i_align.data.loader import PreferenceDataset
from t2i_align.data.opening import open_dataset
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import StandIn, jpeg, noise_jpeg, pick_rows, write_images, write_jsonl, write_parquet

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
    frames: int | None = None,
    **data: Any,
) -> PreferenceDataset:
    return open_dataset(
        DataConfig(path=str(path), **data),
        ModelConfig(path="a model"),
        needs=needs,
        pipeline=pipeline,
        encoder_fingerprint=lambda: encoders,
        size=size,
        frames=frames,
        cache_root=tmp_path / "cache",
        progress=False,
    )


def batches(source: PreferenceDataset, count: int, batch_size: int = 4, **options: Any) -> list[Batch]:
    options = {"seed": 0, "start_step": 0, "accumulate": 1, "rank": 0, "world": 1, "workers": 0, **options}
    return [source.to_batch(item, CPU) for item in islice(source.loader(batch_size=batch_size, **options), count)]


def keys(found: Sequence[Batch]) -> list[str]:
    return [key for batch in found for key in batch.keys]


def entries(folder: Path, candidates: Sequence[int], **more: Any) -> Path:
    """A JSONL whose groups have these numbers of candidates."""
    write_images(folder, [f"{n}.jpg" for n in range(3)])
    groups = [{"prompt": "p", "images": [f"{n}.jpg" for n in range(k)], "scores": list(range(k)), **more}
              for k in candidates]  # fmt: skip
    return write_jsonl(folder / "d.jsonl", groups)


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


def test_how_many_images_are_encoded_at_once_is_no_part_of_the_cache(tmp_path: Path, pairs: Path) -> None:
    sizes: list[int] = []

    class Counting(StandIn):
        def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
            sizes.append(len(pixels))
            return super().encode_pixels(pixels)

    first = opened(tmp_path, pairs, pipeline=Counting, encode_batch=3)
    assert max(sizes) == 3
    assert opened(tmp_path, pairs, pipeline=never, encode_batch=5).fingerprint == first.fingerprint


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


@pytest.mark.parametrize("cache", [True, False])
def test_a_size_the_vae_cannot_take(tmp_path: Path, pairs: Path, sd_path: Path, cache: bool) -> None:
    with pytest.raises(pipelines.PipelineError, match="multiples of 2"):
        opened(tmp_path, pairs, pipeline=lambda: pipelines.load(sd_path), size=(33, 32), cache=cache)
    assert not (tmp_path / "cache").exists()


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


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("schema", ("diffusers", "transformers", "pyarrow", "pipelines", "datasets", "t2i_align.data.readers")),
        ("loader", ("pipelines",)),
    ],
)
def test_imports_are_light(module: str, heavy: tuple[str, ...]) -> None:
    """Objectives import the schema; and a user's own `pipelines` folder must not break reading and opening data."""
    script = f"import sys, t2i_align.data.{module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                            cwd=Path(__file__).parents[2])  # fmt: skip
    assert result.stdout.strip() == "[]"
