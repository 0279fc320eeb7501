"""Aspect-ratio buckets: SDXL's sizes, the right one for each group, and batches of one size that lose nothing."""

from __future__ import annotations

import io
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from t2i_align.data import encode, readers
from t2i_align.data.encode import bucket_sizes, nearest
from t2i_align.data.media import measure
from t2i_align.data.store import Store
from t2i_align.errors import UserError
from tests.data import test_loader
from tests.data.test_examples import contents, jpeg, noise_jpeg, pick_rows, write_parquet

SIDES = [(64, 64), (40, 80), (80, 40), (64, 64), (50, 60), (120, 30)]  # width, height of the images of each row


def test_the_sizes_are_those_of_sdxl() -> None:
    """The list of its paper's appendix I, and one of it turned; other resolutions have it in their unit."""
    long_sides = {512: [2048, 1984, 1920, 1856], 576: [1792, 1728, 1664], 640: [1600, 1536], 704: [1472, 1408, 1344],
                  768: [1344, 1280], 832: [1216, 1152], 896: [1152, 1088], 960: [1088, 1024]}  # fmt: skip
    wide = {(height, width) for height, widths in long_sides.items() for width in widths}
    listed = wide | {(width, height) for height, width in wide} | {(1024, 1024)}
    assert {*bucket_sizes(1024)} == listed and len(listed) == 40 + 1
    assert bucket_sizes(512) == tuple((height // 2, width // 2) for height, width in bucket_sizes(1024))
    for resolution in (256, 480, 640, 768, 832, 1000):
        assert all(side % 16 == 0 for size in bucket_sizes(resolution) for side in size)
        assert bucket_sizes(resolution)[nearest([(1, 1)], bucket_sizes(resolution))][0] > 0.95 * resolution


def test_the_nearest_ratio_of_a_group() -> None:
    sizes = bucket_sizes(1024)
    assert sizes[nearest([(1080, 1920)], sizes)] == (768, 1344)
    assert sizes[nearest([(600, 600), (1200, 1200)], sizes)] == (1024, 1024)
    assert sizes[nearest([(500, 1000), (1000, 500)], sizes)] == (1024, 1024)  # the mean of 1/2 and 2
    assert sizes[nearest([(10, 1000)], sizes)] == (512, 2048)


def test_a_image_is_measured_upright_and_unopened(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "JPEG", exif=exif)
    assert measure(stream.getvalue()) == (30, 20) and measure(jpeg(0, (30, 20))) == (20, 30)
    (tmp_path / "a.jpg").write_bytes(noise_jpeg(0, side=32)[:-100])
    assert measure(tmp_path / "a.jpg") == (32, 32) and measure(b"no image") is None


def opened(source: Path, root: Path, **data: Any) -> Any:
    return test_loader.opened(root, source, size=(64, 64), **{"buckets": True, **data})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = pick_rows(4 * len(SIDES))
    for row in range(len(rows["caption"])):
        for place in (0, 1):
            rows[f"jpg_{place}"][row] = jpeg(2 * row + place, SIDES[row % len(SIDES)])
    rows["jpg_0"][7] = rows["jpg_0"][7][:-60]
    rows["label_0"][8] = None
    return write_parquet(tmp_path / "a.parquet", rows)


def test_batches_have_one_size_and_every_group_is_there(tmp_path: Path, source: Path) -> None:
    found = opened(source, tmp_path)
    assert found.counts == {"groups": 22, "skipped": 2} and isinstance(found.store, Store)
    loader = found.loader(seed=0, start_step=0, batch_size=2, accumulate=1, rank=0, world=1, workers=0)
    seen: dict[str, tuple[int, ...]] = {}
    for item in islice(loader, 24):
        batch = found.to_batch(item, torch.device("cpu"))
        seen |= dict.fromkeys((key.split("/")[1] for key in batch.keys), tuple(batch.latents.shape[2:]))
    assert len(seen) == 22
    for key, (_, height, width) in seen.items():
        wide, high = SIDES[(int(key) - 1000) % len(SIDES)]
        sizes = bucket_sizes(64)
        want = min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(high / wide)))
        assert (2 * height, 2 * width) == want
    reasons = (found.store.path / "skipped.jsonl").read_text()
    assert "'label_0' must be a finite number, found None" in reasons and "cannot be decoded" in reasons
    assert opened(found.store.path, tmp_path, buckets=False).counts["groups"] == 22  # named as a cache


def test_space_for_buckets_is_checked_before_the_start(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 pairs of 3 x 32 x 32 halves at most and 6 texts of 26 bytes: 282,780 bytes."""
    for free, fits in ((282_779, False), (282_780, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        if fits:
            opened(source, tmp_path)
        else:
            with pytest.raises(UserError, match="the cache needs about"):
                opened(source, tmp_path)
            assert not (tmp_path / "cache").exists()


def test_the_source_is_read_once_and_not_beyond_the_limit(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sizes occur, and each image is decoded once. A limit of five ends the reading with the fifth pair."""
    decoded: list[Any] = []
    rows: list[Any] = []
    load, read = encode.load, readers.read
    monkeypatch.setattr(encode, "load", lambda *args: decoded.append(args) or load(*args))

    def counted(*args: Any, **options: Any) -> Any:
        for item in read(*args, **options):
            rows.extend([item] if options.get("images", True) else [])
            yield item

    monkeypatch.setattr(readers, "read", counted)
    whole = opened(source, tmp_path / "whole")
    assert len({*whole.store.bucket.tolist()}) >= 4 and len(rows) == 24 and len(decoded) == 2 * 23
    for buckets in (True, False):
        rows.clear(), decoded.clear()
        assert opened(source, tmp_path / "limited", limit=5, buckets=buckets).counts["groups"] == 5
        assert len(rows) == 5 and len(decoded) == 10


def test_an_interrupted_prepare_of_buckets_continues(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "MAX_ROWS_PER_SHARD", 5)
    whole = opened(source, tmp_path / "whole").store.path
    part = opened(source, tmp_path / "part").store.path
    for number in (1, 3):
        shutil.rmtree(part / f"shard-{number:05d}")  # a lost shard is encoded again, also of a finished folder
    assert opened(source, tmp_path / "part").counts["groups"] == 22
    assert contents(part) == contents(whole)
    with pytest.raises(UserError, match="false without data"):
        opened(source, tmp_path, cache=False)


def test_buckets_that_are_smaller_than_a_step_are_reported(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = opened(source, tmp_path)
    found.loader(seed=0, start_step=0, batch_size=2)
    assert not caplog.messages
    found.loader(seed=0, start_step=0, batch_size=2, accumulate=2)  # two buckets have lost one of four groups
    assert sorted(message.partition(": ")[2].partition(";")[0] for message in caplog.messages) == [
        "3 groups, fewer than a step's 4",
        "3 groups, fewer than a step's 4",
    ]
