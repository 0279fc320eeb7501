"""Aspect-ratio buckets: images are cropped to the nearest of several sizes of the same area, not all to a square.

    <folder>/buckets.npy, buckets.json   which bucket each row of the source is in, and which there are
             00896x01152/                a latent cache of the groups in that bucket, as `cache.prepare` makes it
             manifest.json               written last

The sizes are those of SDXL's training (arXiv 2307.01952, appendix I): both sides are multiples of a sixteenth of the
resolution, from half of it to twice, and the area is at least 0.9 of the square's and not above it. At 1024 that gives
the 40 of the paper and 1344 x 704, which it lists the other way round only. SD3 (arXiv 2403.03206) buckets by area as
well, and lists no sizes. A group is in one bucket, so that its candidates have latents of one shape; a batch holds
groups of one bucket (`sampling.BucketSampler`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from t2i_align.data.cache import CachedGroups, Item, check_space, open_cache, prepare
from t2i_align.data.latents import Latents
from t2i_align.data.layout import FINGERPRINT, LAYOUT, MANIFEST, SKIPPED, Parts, differences, write_json
from t2i_align.data.media import MediaSize, measure
from t2i_align.data.readers import Limit
from t2i_align.data.sampling import Position
from t2i_align.data.schema import Batch, Conditioning, Group, Items, Skipped
from t2i_align.data.survey import Survey
from t2i_align.errors import UserError

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

CONTENT = "buckets"
NUMBERS = "buckets.npy"
LEAST_AREA = 0.9  # of the square's
Size = tuple[int, int]  # (height, width) in pixels


@lru_cache
def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """The sizes for a resolution, by aspect ratio; at 1024, from 512 x 2048 to 2048 x 512 in steps of 64."""
    step = max(8, 16 * round(resolution / 256))  # what VAE and patches can divide, whatever the resolution
    sides = range(step * (resolution // 2 // step), 2 * resolution + 1, step)
    area = resolution**2
    of_ratio = {h / w: (h, w) for h, w in product(sides, sides) if LEAST_AREA * area <= h * w <= area}  # the largest
    return tuple(size for _, size in sorted(of_ratio.items()))


def nearest(found: Sequence[Size], sizes: Sequence[Size]) -> int:
    """The number of the size whose aspect ratio is nearest to the (geometric) mean of those of some images."""
    ratio = sum(math.log(height / width) for height, width in found) / len(found)
    return min(range(len(sizes)), key=lambda n: abs(ratio - math.log(sizes[n][0] / sizes[n][1])))


def prepare_buckets(
    read: Callable[[], Items],
    pipeline: TrainablePipeline,
    out: Path,
    *,
    fingerprint: Parts,
    resolution: int,
    survey: Survey,
    batch_size: int = 8,
    limit: Limit | None = None,
    progress: bool = True,
) -> None:
    """Encode a source into one cache a bucket; continues like `cache.prepare`.

    Args:
        read: gives the source's items from the start, in the same order each time: once to measure the images, and
            once for each bucket that there is.
        resolution: side of the square whose area the sizes have.

    Raises:
        PipelineError: a size the VAE cannot take. UserError: another fingerprint, no space, nothing usable.
    """
    sizes = bucket_sizes(resolution)
    for size in sizes:
        pipeline.check_size(*size)
    check_space(out, survey, Latents(pipeline, MediaSize(*max(sizes, key=math.prod)), batch_size), limit)
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):
        _claim(out, fingerprint)
        if not (out / NUMBERS).exists():
            temporary = out / f"{NUMBERS}.tmp"
            with open(temporary, "wb") as stream:
                np.save(stream, _assigned(read(), sizes, limit))
            temporary.replace(out / NUMBERS)
    numbers = np.load(out / NUMBERS)
    used = [n for n in range(len(sizes)) if (numbers == n).any()]
    # Rows that are skipped already have no size: they are written down with the first bucket.
    for n in used:
        height, width = sizes[n]
        prepare(_in_bucket(read(), numbers, n, with_skipped=n == used[0]), pipeline, out / _name(sizes[n]),
                fingerprint={**fingerprint, "height": height, "width": width}, height=height, width=width,
                batch_size=batch_size, progress=progress, may_be_empty=True)  # fmt: skip
    with FileLock(out / ".lock"):
        _finish(out, fingerprint, [sizes[n] for n in used])


class BucketedGroups:
    """Finished caches of several sizes as one; see `CachedGroups`, whose attributes it has.

    bucket: for each group, the number of its bucket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        if self.manifest["layout"] != LAYOUT:
            raise UserError(f"{path}: prepared with layout {self.manifest['layout']!r}, this version reads {LAYOUT}")
        self.parts: list[CachedGroups] = [open_cache(path / _name(size)) for size in self.manifest["buckets"]]
        self.k, self.best, self.worst, self.tie = (
            np.concatenate([getattr(part, name) for part in self.parts]) for name in ("k", "best", "worst", "tie")
        )
        lengths = [len(part) for part in self.parts]
        self.bucket = np.repeat(np.arange(len(self.parts)), lengths)
        self.starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self.k)

    def fetch(self, rows: Sequence[Position], pairs: bool = False, columns: Sequence[str] = ()) -> Item:
        """The micro-batch of groups (epoch, number), which must be of one bucket."""
        (bucket,) = {int(self.bucket[number]) for _, number in rows}
        start = int(self.starts[bucket])
        return self.parts[bucket].fetch([(epoch, number - start) for epoch, number in rows], pairs, columns)

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        """The micro-batch on its device, in float32."""
        return self.parts[0].to_batch(item, device)

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...], float32."""
        return self.parts[0].empty_conditioning(device)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a worker process maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def is_bucketed(path: Path) -> bool:
    """Whether a finished folder holds buckets."""
    return (path / NUMBERS).is_file() and (path / MANIFEST).is_file()


def _claim(out: Path, fingerprint: Parts) -> None:
    wanted = json.loads(json.dumps(dict(fingerprint)))
    file = out / FINGERPRINT
    if not file.exists():
        write_json(file, wanted)
    elif found := differences(json.loads(file.read_text()), wanted, "this folder has", "this run wants"):
        raise UserError(f"{out}: this folder was prepared from something else. {found}. Choose another folder.")


def _assigned(items: Iterable[Group | Skipped], sizes: Sequence[Size], limit: Limit | None) -> np.ndarray:
    """The bucket of each item, -1 for skipped ones; it ends where the limit is reached."""
    numbers: list[int] = []
    square = nearest([(1, 1)], sizes)
    counted = 0
    for item in items:
        if isinstance(item, Skipped):
            numbers.append(-1)
            continue
        found = [size for media in item.candidates if (size := measure(media))]
        numbers.append(nearest(found, sizes) if len(found) == len(item.candidates) else square)
        counted += limit is not None and limit.counts(item)
        if limit is not None and counted >= limit.groups:
            break
    return np.array(numbers, np.int16)


def _in_bucket(items: Items, numbers: np.ndarray, bucket: int, with_skipped: bool) -> Iterator[Group | Skipped]:
    for item, number in zip(items, numbers.tolist(), strict=False):  # a limit ends the numbers first
        if number == bucket or (with_skipped and number < 0):
            yield item


def _finish(out: Path, fingerprint: Parts, sizes: Sequence[Size]) -> None:
    counts: Counter[str] = Counter()
    nested: dict[str, Counter[str]] = {"candidates": Counter(), "columns": Counter()}
    lines = []
    for size in sizes:
        found = json.loads((out / _name(size) / MANIFEST).read_text())["counts"]
        for name, values in nested.items():
            values.update(found.pop(name))
        counts.update(found)
        lines.append((out / _name(size) / SKIPPED).read_text())
    if not counts["groups"]:
        raise UserError(f"{out}: no usable group among {counts['skipped']} rows; {SKIPPED} in its folders says why")
    (out / SKIPPED).write_text("".join(lines))
    every = {**counts, **{name: dict(values) for name, values in nested.items()}}
    write_json(out / MANIFEST, {"layout": LAYOUT, "fingerprint": dict(fingerprint), "content": CONTENT,
                                "buckets": [list(size) for size in sizes], "counts": every})  # fmt: skip


def _name(size: Sequence[int]) -> str:
    return f"{size[0]:05d}x{size[1]:05d}"
