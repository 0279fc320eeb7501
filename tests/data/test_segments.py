"""Scores of a clip's segments: read, refused, and handed to training as a number for each latent frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pipelines
from t2i_align.data.annotations import Annotations
from t2i_align.data.readers import read
from t2i_align.data.schema import COLUMNS, Group, Skipped
from t2i_align.data.segments import by_latent_frame, latent_segments, segments
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import write_jsonl
from tests.pipelines.conftest import PathOf, first_batch, opened
from tests.runs import jsonl_clips

NEEDS = Requirements(candidates=2, columns=("segment_scores", "segment_seconds"))
LABELS = {"segment_scores": [[1, 0, 0.5], [0, 1, 0.5]], "segment_seconds": 0.25}


@pytest.mark.parametrize(
    ("frames", "fps", "seconds", "sizes"),
    [
        (81, 16, 1, [16] * 5 + [1]),
        (121, 24, 1, [24] * 5 + [1]),
        (9, 16, 0.25, [4, 4, 1]),
        (8, 10, 0.3, [3, 3, 2]),
        (30, 29.97, 1, [30]),
        (32, 29.97, 1, [30, 2]),
        (5, 16, 1, [5]),
    ],
)
def test_every_frame_is_in_one_segment(frames: int, fps: float, seconds: float, sizes: list[int]) -> None:
    """Frame i begins at i / fps; the last segment has what is left."""
    ranges = segments(frames, fps, seconds)
    assert [len(one) for one in ranges] == sizes
    assert [frame for one in ranges for frame in one] == list(range(frames))


@pytest.mark.parametrize(
    ("name", "frames", "fps", "seconds", "expected"),
    [
        # Wan, 4 frames a latent: at 16 a second, frames 13 to 16 are the first latent with a frame of the next second.
        ("wan", 81, 16.0, 1.0, [0] * 5 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4),
        ("wan", 9, 16.0, 0.25, [0, 0, 1]),  # frames 0, 1-4, 5-8 of segments 0-3, 4-7, 8
        ("wan", 9, None, 0.25, [0, 0, 1]),  # the family's rate
        ("wan", 9, 8.0, 0.25, [0, 1, 3]),  # of frames 1-4, 2 and 3 are in segment 1; frames 5-8: 6 and 7
        ("cogvideox", 17, 8.0, 1.0, [0, 0, 0, 1, 1]),  # frames 5-8 have one of segment 1, 9-12 and 13-16 all
        ("cogvideox-1.5", 9, 8.0, 1.0, [0, 0, 0, 0]),  # a copy of the first latent comes before it
        ("ltx", 25, 24.0, 0.5, [0, 0, 1, 1]),  # 8 frames a latent: 9-16 have 4 of each half second's: the earlier
    ],
)
def test_latent_frames_lie_where_most_of_their_frames_do(
    name: str, frames: int, fps: float | None, seconds: float, expected: list[int], path: PathOf
) -> None:
    pipeline = pipelines.load(path(name), encoders=False)
    times = pipeline.latent_times(frames, fps)  # type: ignore[attr-defined]
    found = latent_segments(times, seconds)
    assert found == expected
    factor, padded = pipeline.temporal_factor, getattr(pipeline, "padded_frames", 0)  # type: ignore[attr-defined]
    own = segments(frames, fps or pipeline.fps, seconds)
    for number, segment in enumerate(found[padded + 1 :]):  # counted frame by frame
        shown = range(1 + number * factor, 1 + (number + 1) * factor)
        counts = [len(set(shown) & set(one)) for one in own]
        assert segment == counts.index(max(counts))


@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox-1.5", "ltx"])
def test_there_is_a_time_for_each_latent_frame(name: str, path: PathOf) -> None:
    pipeline = pipelines.load(path(name))
    frames = pipeline.default_frames + pipeline.frame_multiple
    latents = pipeline.encode_pixels(torch.rand(1, frames, 3, *pipeline.default_size))
    assert len(pipeline.latent_times(frames)) == latents.shape[2]  # type: ignore[attr-defined]


def test_the_numbers_of_a_batch() -> None:
    """Groups whose segments have other lengths make one batch."""
    columns = {
        "segment_scores": [[[1, 2], [3, 4]], [[5, 6, 7], [8, 9, 0]]],
        "segment_seconds": [1.0, 0.5],
        "user": "ab",
    }
    out = by_latent_frame(columns, [0.0, 0.4, 0.9, 1.4])
    expected = [[[1, 1, 1, 2], [3, 3, 3, 4]], [[5, 5, 6, 7], [8, 8, 9, 0]]]
    assert out["segment_scores"].tolist() == expected and out["user"] == "ab"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_segments_are_read_from_every_table_and_follow_their_candidates(ending: str, tmp_path: Path) -> None:
    """The second clip is the better one, so its segments come first."""
    jsonl_clips(tmp_path, 3, count=1)
    row: dict[str, Any] = {"prompt": "p", "images": ["0_good.mp4", "0_bad.mp4"], "scores": [0, 1], **LABELS}
    file = tmp_path / f"d.{ending}"
    if ending == "jsonl":
        write_jsonl(file, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    (group,) = read(file)
    assert isinstance(group, Group), group
    assert group.segment_scores == ((0, 1, 0.5), (1, 0, 0.5)) and group.segment_seconds == 0.25
    assert group.take([1]).segment_scores == ((1, 0, 0.5),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "must be a list, found 1"),
        ([1, 0], "must be a list of lists of finite numbers"),
        ([[1], []], "must be a list of lists of finite numbers"),
        ([[1, None], [0, 1]], "must be a list of lists of finite numbers"),
        ([[1, float("inf")], [0, 1]], "must be a list of lists of finite numbers"),
        ([[1, 0, 1], [0, 1]], r"must have as many segments for each candidate, found \[\[1, 0, 1\], \[0, 1\]\]"),
    ],
)
def test_other_values_are_refused(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        COLUMNS["segment_scores"].parse(value, "segment_scores")
    file = write_jsonl(tmp_path / "labels.jsonl", [{"id": "1", "segment_scores": value}])
    with pytest.raises(UserError, match=rf"labels\.jsonl, line 1.*'segment_scores' {message}"):
        Annotations.load([file])
    jsonl_clips(tmp_path, 3, count=1)
    row = {"prompt": "p", "chosen": "0_good.mp4", "rejected": "0_bad.mp4", "segment_scores": value}
    (item,) = read(write_jsonl(tmp_path / "d.jsonl", [row]))
    assert isinstance(item, Skipped)


@pytest.mark.parametrize("cache", [True, False])
def test_labels_reach_a_batch_through_cache_and_stream(cache: bool, tmp_path: Path, path: PathOf) -> None:
    """9 frames at 16 a second: latent frames 0 and 1 lie in the first quarter of a second, the last in the second."""
    clips = jsonl_clips(tmp_path / "clips", 9, count=4)
    short = {**LABELS, "segment_scores": [[1], [0]]}
    rows = [LABELS, {**LABELS, "segment_scores": [[0, 1], [0, 0]]}, *[short] * (2 * cache)]
    rows = [{"id": f"clips.jsonl:{number}", **row} for number, row in enumerate(rows, 1)]
    labels = write_jsonl(tmp_path / "labels.jsonl", rows)
    options: dict[str, Any] = {"annotations": [str(labels)], "needs": NEEDS, "cache": cache}
    source = opened(tmp_path, clips, pipelines.load(path("wan")), (32, 32), 9, **options)
    batch = first_batch(source, 2)
    found = dict(zip(batch.keys, batch.segment_scores.tolist(), strict=True))
    assert found == {
        "0/clips.jsonl:1": [[1, 1, 0], [0, 0, 1]],
        "0/clips.jsonl:2": [[0, 0, 1], [0, 0, 0]],
    }
    assert batch.take([1, 0]).segment_scores[:, 0].tolist() == batch.segment_scores[:, 1].tolist()
    if cache:
        (file,) = tmp_path.glob("cache/*/skipped.jsonl")
        reasons = [json.loads(line)["reason"] for line in file.read_text().splitlines()]
        assert reasons == ["segment_scores of 1 segments of 0.25 s; its frames lie in 2"] * 2


def test_labels_without_their_seconds_are_skipped(tmp_path: Path, path: PathOf) -> None:
    clips = jsonl_clips(tmp_path / "clips", 9, count=1)
    labels = write_jsonl(tmp_path / "labels.jsonl", [{"id": "clips.jsonl:1", "segment_scores": [[1], [0]]}])
    with pytest.raises(UserError, match="segment_scores without segment_seconds above 0, found None"):
        opened(tmp_path, clips, pipelines.load(path("wan")), (32, 32), 9, annotations=[str(labels)])
