"""No latent cache: images and clips are decoded in the loader's workers and encoded with each batch.

What is stored is an index: groups with their images' paths, or for sources that hold images inside (parquet),
their encoded bytes as they are. Each of them is decoded once while the index is made, so that a damaged one is
skipped and recorded then, and not met in the middle of a run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from t2i_align.data.layout import Parts, readable
from t2i_align.data.media import ImageError, MediaSize, check, load, time_ids, to_bytes
from t2i_align.data.readers import Limit
from t2i_align.data.sampling import Position
from t2i_align.data.schema import Batch, Conditioning, Group, Media, Skipped
from t2i_align.data.shards import Row, write
from t2i_align.data.stored import Store
from t2i_align.data.survey import Survey
from t2i_align.errors import UserError

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

CONTENT = "images"
ROWS_PER_SHARD = 256
ROWS_AT_ONCE = 16


class LiveItem(NamedTuple):
    """A micro-batch as the loader hands it over: pixels [B, k, 3, H, W] or [B, k, F, 3, H, W] of 8 bits."""

    keys: tuple[str, ...]
    scores: Tensor
    pixels: Tensor
    prompts: Sequence[str]
    captions: Sequence[Sequence[str]] | None = None
    negative_captions: Sequence[str] | None = None
    sizes: Tensor | None = None


class Images:
    """What an index stores: paths, or encoded bytes. See `shards.Payload`."""

    columns = (("paths", pa.list_(pa.binary())), ("bytes", pa.list_(pa.large_binary())))  # paths need not be UTF-8

    def __init__(self, extent: MediaSize) -> None:
        self.extent = extent
        self.executor = ThreadPoolExecutor(os.cpu_count())

    def encode(self, groups: Sequence[Group]) -> list[Row | Skipped]:
        return list(self.executor.map(self._row, groups))

    def tables(self) -> dict[str, pa.Table]:
        return {}

    def resume(self, shard: Path) -> None:
        pass

    def pass_over(self, groups: Sequence[Group]) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        self.executor.shutdown()
        return {"content": CONTENT}

    def _row(self, group: Group) -> Row | Skipped:
        for place, media in enumerate(group.candidates):
            try:
                check(media, self.extent)
            except ImageError as error:
                return Skipped(id=group.id, origin=group.origin, reason=f"candidate {place + 1} (best first): {error}")
        return {
            "paths": [os.fsencode(media) if isinstance(media, Path) else None for media in group.candidates],
            "bytes": [media if isinstance(media, bytes) else None for media in group.candidates],
        }


def index_images(
    groups: Iterable[Group | Skipped],
    out: Path,
    *,
    fingerprint: Parts,
    extent: MediaSize,
    survey: Survey,
    source_bytes: int,
    limit: Limit | None = None,
    progress: bool = True,
) -> None:
    """Write the index of a source to `out`; continues like `cache.prepare`.

    Args:
        extent: how candidates will be wanted, as it decides which of them can be used.
        source_bytes: size of images that the index will hold itself, for the check of disk space.
    """
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if source_bytes > free:
        raise UserError(f"{out}: the index needs {readable(source_bytes)}, {readable(free)} are free there")
    write(
        groups,
        Images(extent),
        out,
        fingerprint=fingerprint,
        rows_per_shard=ROWS_PER_SHARD,
        rows_at_once=ROWS_AT_ONCE,
        total=survey.rows,
        limit=limit,
        progress=progress,
        what="index",
    )


class LiveGroups(Store):
    """A finished index and the pipeline that encodes what it names."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.extent = MediaSize(0, 0)
        self.pipeline: TrainablePipeline | None = None
        self.size_conditioned = False

    def encode_with(self, pipeline: TrainablePipeline, extent: MediaSize) -> LiveGroups:
        """Say who encodes, and how candidates are wanted."""
        self.pipeline, self.extent, self.size_conditioned = pipeline, extent, pipeline.size_conditioned
        return self

    def media(self, number: int) -> list[Media]:
        """A group's images or clips, best first."""
        shard, row = self.group(number)
        paths, contents = shard.groups["paths"][row].as_py(), shard.groups["bytes"][row].as_py()
        return [
            content if path is None else Path(os.fsdecode(path)) for path, content in zip(paths, contents, strict=True)
        ]

    def fetch(self, rows: Sequence[Position], pairs: bool = False, columns: Sequence[str] = ()) -> LiveItem:
        """The micro-batch of groups (epoch, number), as `CachedGroups.fetch` gives it; decodes their candidates."""
        keys, scores, pixels, prompts, captions, negatives, sizes = [], [], [], [], [], [], []
        for epoch, number in rows:
            shard, row = self.group(number)
            taken = self.taken(number, pairs)
            keys.append(f"{epoch}/{shard.ids[row].as_py()}")
            scores.append(shard.scores_of(row)[taken])
            prompts.append(shard.groups["prompt"][row].as_py())
            if "captions" in columns:
                captions.append(shard.groups["captions"][row].as_py()[taken])
            if "negative_caption" in columns:
                negatives.append(shard.groups["negative_caption"][row].as_py())
            loaded = [self._load(media, keys[-1]) for media in self.media(number)[taken]]
            pixels.append(torch.stack([image for image, _ in loaded]))
            sizes.append([time_ids(size, self.extent.height, self.extent.width) for _, size in loaded])
        return LiveItem(
            keys=tuple(keys),
            scores=torch.from_numpy(np.stack(scores)).float(),
            pixels=torch.stack(pixels),
            prompts=tuple(prompts),
            captions=captions or None,
            negative_captions=negatives or None,
            sizes=torch.tensor(sizes).float() if self.size_conditioned else None,
        )

    def to_batch(self, item: LiveItem, device: torch.device) -> Batch:
        """Encode the micro-batch, in float32 on its device: images together, clips one by one."""
        groups, k = item.pixels.shape[:2]
        pixels, encode = item.pixels.flatten(0, 1), self._encoder().encode_pixels
        latents = torch.cat([
            encode(part.float() / 255).to(device).float()
            for part in pixels.split(len(pixels) if self.extent.frames is None else 1)
        ])  # fmt: skip
        captions = negative = None
        if item.captions is not None:
            flat = self._conditioning([text for texts in item.captions for text in texts], device)
            captions = {name: tensor.unflatten(0, (groups, k)) for name, tensor in flat.items()}
        if item.negative_captions is not None:
            negative = self._conditioning(item.negative_captions, device)
        return Batch(
            keys=item.keys,
            latents=latents.unflatten(0, (groups, k)),
            scores=item.scores.to(device, non_blocking=True),
            conditioning=self._conditioning(item.prompts, device),
            columns={"captions": captions, "negative_caption": negative},
            sizes=None if item.sizes is None else item.sizes.to(device, non_blocking=True),
        )

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...], float32."""
        return self._conditioning([""], device)

    def _conditioning(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        encoded = self._encoder().encode_prompts(prompts)
        return {
            name: tensor.to(device).float() if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in encoded.items()
        }

    def _encoder(self) -> TrainablePipeline:
        if self.pipeline is None:
            raise RuntimeError("LiveGroups.encode_with comes before batches")
        return self.pipeline

    def _load(self, media: Media, key: str) -> tuple[Tensor, tuple[int, int]]:
        """A candidate's pixels in the 8 bits that it has, a quarter of what goes through the loader's queue, and its
        original size."""
        try:
            found = load(media, self.extent)
        except ImageError as error:  # it could be decoded when the index was made
            raise UserError(f"group {key}: an image has changed since it was indexed: {error}") from error
        return to_bytes(found.pixels), found.size

    def __getstate__(self) -> dict[str, Any]:
        # Workers decode; the pipeline stays here.
        return {"path": self.path, "extent": self.extent, "sized": self.size_conditioned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.extent, self.size_conditioned = state["extent"], state["sized"]
