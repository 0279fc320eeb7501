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

from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data.loader import AnySource, open_source
from t2i_align.data.schema import Batch
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import StandIn, colour, jpeg
from tests.formats import lines, shard

GROUPS = 17


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


def opened(shards: Path, **data: Any) -> AnySource:
    return open_source(
        DataConfig(path=str(shards), **{"stream": 5, **data}),
        ModelConfig(path="a model"),
        needs=Requirements(candidates=2, ties=False),
        pipeline=lambda: StandIn(),  # type: ignore[arg-type, return-value]
        encoder_fingerprint=lambda: "e",
        size=(8, 8),
        cache_root=shards.parent / "cache",
        progress=False,
    )


def batches(source: AnySource, batch_size: int = 2, step: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    loader = source.loader(
        seed=0, start_step=step, batch_size=batch_size, accumulate=1, rank=rank, world=world, workers=0
    )
    return (source.to_batch(item, torch.device("cpu")) for item in loader)


def keys(found: Iterator[Batch], count: int) -> list[str]:
    return [key for batch in islice(found, count) for key in batch.keys]


def test_each_group_comes_once_an_epoch_with_its_own_images(shards: Path) -> None:
    """17 usable groups: 34 make two epochs, in another order; batches of 2 go over windows and epochs."""
    found = list(islice(batches(opened(shards)), GROUPS))
    named = [key.split("/", 1) for batch in found for key in batch.keys]
    epochs = [[name for epoch, name in named if epoch == str(e)] for e in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == GROUPS
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == GROUPS and epochs[0] != epochs[1]
    for batch in found:
        assert batch.latents.shape == (2, 2, 3, 4, 4) and batch.scores.tolist() == [[1, 0]] * 2
        for key, latents in zip(batch.keys, batch.latents, strict=True):
            number = int(key.rsplit(":", 1)[1])
            want = torch.tensor([colour(2 * number), colour(2 * number + 1)]) / 255
            assert (latents.mean((2, 3)) - want).abs().max() < 0.02


def test_it_resumes_with_the_very_next_group(shards: Path) -> None:
    """From the list of windows alone, and where even that is lost or its last line cut short."""
    whole = keys(batches(opened(shards)), 20)
    (root,) = (shards.parent / "cache").glob("stream-*/0")
    for lost in ("windows", "line", "all"):
        for window in root.glob("*-*"):
            shutil.rmtree(window)
        if lost == "line":
            (root / "windows.jsonl").write_bytes((root / "windows.jsonl").read_bytes()[:-9])
        elif lost == "all":
            (root / "windows.jsonl").unlink()
        for step in (1, 7, 13):
            assert keys(batches(opened(shards), step=step), 3) == whole[2 * step : 2 * step + 6], (lost, step)


def test_processes_cut_the_same_stream(shards: Path) -> None:
    whole = keys(batches(opened(shards), batch_size=4), 6)
    (root,) = (shards.parent / "cache").glob("stream-*/0")
    assert len([entry for entry in root.iterdir() if entry.is_dir()]) == 3  # what is behind is deleted
    ranks = [batches(opened(shards), batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    shared = [key for _ in range(6) for rank in ranks for key in keys(rank, 1)]
    assert shared == whole


def test_what_cannot_be_used_is_written_down(shards: Path) -> None:
    keys(batches(opened(shards)), 12)
    (root,) = (shards.parent / "cache").glob("stream-*/0")
    (row,) = [json.loads(line) for line in (root / "skipped.jsonl").read_text().splitlines()][:1]
    assert row["id"].endswith("0009") and "not an image" in row["reason"]


def test_what_a_stream_cannot_do(shards: Path, tmp_path: Path) -> None:
    for other in ({"limit": 3}, {"annotations": ["a.jsonl"]}, {"buckets": True}):
        with pytest.raises(
            UserError, match=r"data\.stream must be null with data\.limit, data\.ann.* or data\.buckets"
        ):
            opened(shards, **other)
    ties = [{"prompt": "x", "images": ["a.jpg", "a.jpg"], "scores": [1, 1]}] * 3
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(UserError, match="of the first 5 rows, none serves this objective"):
        opened(lines(tmp_path / "d.jsonl", ties))
