"""A stream gives each group once an epoch, whatever cuts it, and resumes with the very next one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.data import hub
from t2i_align.data.batch import Batch
from t2i_align.data.loader import PreferenceDataset
from t2i_align.errors import UserError
from tests.data import test_loader
from tests.data.test_examples import colour, jpeg, pick_rows, write_images, write_jsonl, write_parquet
from tests.formats import shard

GROUPS = 18


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 7, 1 and 12 samples; of these, one has a damaged image and two are ties."""
    folder = tmp_path / "shards"
    folder.mkdir()
    number = 0
    for piece, count in enumerate((7, 1, 12)):
        members: dict[str, bytes] = {}
        for _ in range(count):
            labels = [0.5, 0.5] if number in (3, 11) else [1, 0]
            entry = {"prompt": f"prompt {number}", "scores": labels}
            second = b"damaged" if number == 9 else jpeg(2 * number + 1)
            key = f"{number:04d}"
            members |= {f"{key}.0.jpg": jpeg(2 * number), f"{key}.1.jpg": second}
            members[f"{key}.json"] = json.dumps(entry).encode()
            number += 1
        shard(folder / f"{piece:06d}.tar", members)
    return folder


def opened(shards: Path, *, path: str | None = None, **data: Any) -> PreferenceDataset:
    return test_loader.opened(shards.parent, path or shards, **{"stream": 5, **data})


def batches(source: PreferenceDataset, batch_size: int = 2, step: int = 0, **options: Any) -> Iterator[Batch]:
    loader = source.loader(**{"seed": 0, "start_step": step, "batch_size": batch_size, **options})
    return (source.to_batch(item, torch.device("cpu")) for item in loader)


def keys(found: Iterator[Batch], count: int) -> list[str]:
    return [key for batch in islice(found, count) for key in batch.keys]


def test_each_group_comes_once_an_epoch_with_its_own_images(shards: Path) -> None:
    """18 groups, one of which is damaged, so that another stands in for it: 36 make two epochs, in another order."""
    seen = list(islice(batches(opened(shards)), GROUPS))
    named = [key.split("/", 1) for batch in seen for key in batch.keys]
    epochs = [[name for epoch, name in named if epoch == str(e)] for e in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == GROUPS
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == GROUPS - 1 and epochs[0] != epochs[1]
    for batch in seen:
        assert batch.latents.shape == (2, 2, 3, 4, 4) and batch.scores.tolist() == [[1, 0]] * 2
        for key, latents in zip(batch.keys, batch.latents, strict=True):
            number = int(key.rsplit(":", 1)[1])
            want = torch.tensor([colour(2 * number), colour(2 * number + 1)]) / 255
            assert (latents.mean((2, 3)) - want).abs().max() < 0.02


def test_an_epoch_is_a_permutation_of_shards_and_of_windows_within(shards: Path) -> None:
    """Shards of 7, 1 and 12 rows, the last in windows of 5, 5 and 2: each is gone through before the next begins."""
    place = {
        f"{shard:06d}.tar:{number:04d}": (shard, (number - first) // 5)
        for shard, first, count in ((0, 0, 7), (1, 7, 1), (2, 8, 12))
        for number in range(first, first + count)
    }
    orders = []
    for seed in (0, 1, 2):
        names = [
            key.split("/")[1] for batch in islice(batches(opened(shards), seed=seed), GROUPS // 2) for key in batch.keys
        ]
        visited = [at for n, at in enumerate(map(place.__getitem__, names)) if n == 0 or at != place[names[n - 1]]]
        assert sorted(visited) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
        assert all(visited.index((shard, 0)) < visited.index((shard, 1)) for shard in (0, 2))
        orders.append(names)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_resumes_with_the_very_next_group_and_writes_nothing(shards: Path, workers: int) -> None:
    before = sorted(shards.parent.rglob("*"))
    whole = keys(batches(opened(shards)), 24)
    for step in (1, 7, 13, 20):  # the last is in the third epoch
        assert keys(batches(opened(shards), step=step, workers=workers), 3) == whole[2 * step : 2 * step + 6], step
    assert sorted(shards.parent.rglob("*")) == before


def test_processes_and_accumulation_cut_the_same_stream(shards: Path) -> None:
    whole = keys(batches(opened(shards), batch_size=4), 6)
    assert keys(batches(opened(shards), batch_size=2, accumulate=2), 12) == whole
    ranks = [batches(opened(shards), batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    assert [key for _ in range(6) for rank in ranks for key in keys(rank, 1)] == whole


def test_without_a_cache_the_source_is_a_stream_of_its_shards(shards: Path) -> None:
    """The same mechanism, without windows; annotations and a limit, which a stream refuses, are possible."""
    source = opened(shards, stream=None, cache=False)
    assert source.counts == opened(shards).counts == {"groups": GROUPS, "skipped": 0, "ties_left_out": 2}
    assert len({*keys(batches(source), GROUPS // 2)}) == GROUPS - 1
    limited = opened(shards, stream=None, cache=False, limit=8)  # the tie of row 3 does not count
    assert limited.counts["groups"] == 8
    assert {key.rsplit(":", 1)[1] for key in keys(batches(limited), 4)} == {f"{n:04d}" for n in range(9)} - {"0003"}


@pytest.mark.parametrize("kind", ["samples", "paths", "ids"])
def test_ids_and_paths_are_those_of_the_whole_source(tmp_path: Path, shards: Path, kind: str) -> None:
    """Shards of one name in two folders: paths are relative to the source, and ids, which random numbers are keyed by,
    differ, even where the files number their rows alike."""
    source = tmp_path / "nested"
    write_images(source / "images", [f"{n}.jpg" for n in range(4)])
    for place, folder in enumerate(("a", "b")):
        (source / folder).mkdir()
        names = [f"images/{2 * place + n}.jpg" for n in (0, 1)]
        if kind == "samples":
            shutil.copy(shards / "000000.tar", source / folder)
        elif kind == "paths":
            rows = {"prompt": ["a fox"], "chosen": names[:1], "rejected": names[1:]}
            write_parquet(source / folder / "0.parquet", rows)
        else:
            write_parquet(source / folder / "0.parquet", {**pick_rows(1), "caption": [f"a fox {folder}"]})
    cached, live, stream = (
        opened(source, **data) for data in ({"stream": None}, {"stream": None, "cache": False}, {"stream": 5})
    )
    whole = {
        key: row for batch in islice(batches(cached, 1), 12) for key, row in zip(batch.keys, batch.latents, strict=True)
    }
    assert len({key for key in whole if key.startswith("0/")}) == (12 if kind == "samples" else 2)
    for source in (live, stream):
        for batch in islice(batches(source, 1), 2):
            torch.testing.assert_close(batch.latents[0], whole[batch.keys[0]], rtol=2**-11, atol=1e-6)


@pytest.fixture
def held(shards: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards as a data set on the Hub; how many were there after each request of one, downloaded or not."""
    held: list[int] = []

    def piece(spec: str, name: str, folder: Path) -> Path:
        assert spec == "hub:owner/name@abc"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards / name, folder / name)
        held.append(len(list(folder.parent.glob("*/*"))))
        return folder / name

    def pieces(spec: str, endings: tuple[str, ...]) -> tuple[list[str], str]:
        return sorted(file.name for file in shards.iterdir()), "hub:owner/name@abc"

    monkeypatch.setattr(hub, "pieces", pieces)
    monkeypatch.setattr(hub, "piece", piece)
    return held


def test_shards_of_the_hub_are_downloaded_one_by_one_and_deleted(shards: Path, held: list[int]) -> None:
    """At most three are there at a time: the one that is read, and two that other processes may still read."""
    for number in range(3, 7):
        shutil.copy(shards / "000001.tar", shards / f"{number:06d}.tar")
    source = opened(shards, path="hub:owner/name")
    whole = keys(batches(source), 30)
    assert max(held) <= 4 and len(held) > 7  # again in each epoch
    assert keys(batches(source, step=13), 3) == whole[26:32]


def test_first_shard_of_the_hub_may_hold_no_usable_group(shards: Path, held: list[int]) -> None:
    tie = {"0.0.jpg": jpeg(0), "0.1.jpg": jpeg(1), "0.json": b'{"prompt": "a fox", "scores": [1, 1]}'}
    shard(shards / "000000.tar", tie)
    assert opened(shards, path="hub:owner/name").counts == {"groups in the first shard": 1, "shards": 3}


def test_what_a_stream_cannot_do(shards: Path, tmp_path: Path) -> None:
    for other in ({"limit": 3}, {"annotations": ["a.jsonl"]}, {"buckets": True}):
        with pytest.raises(UserError, match=r"with data\.limit, data\.annotations, data\.buckets or data\.flip"):
            opened(shards, **other)
    ties = [{"prompt": "x", "images": ["a.jpg", "a.jpg"], "scores": [1, 1]}] * 3
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(UserError, match="no group is left: of 3, 3 are ties"):
        opened(write_jsonl(tmp_path / "d.jsonl", ties))
