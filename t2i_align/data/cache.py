"""The latent cache: images, clips and texts encoded once, then trained on without VAE or text encoder.

Latents and embeddings are kept in half precision, each distinct prompt or caption once, the empty prompt always.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from t2i_align.data.latents import CONTENT, Latents
from t2i_align.data.layout import PROMPTS, Parts, read_table, readable
from t2i_align.data.media import MediaSize, time_ids
from t2i_align.data.readers import Limit
from t2i_align.data.sampling import Position
from t2i_align.data.schema import Batch, Conditioning, Group, Skipped
from t2i_align.data.shards import write
from t2i_align.data.stored import Shard, Store
from t2i_align.data.survey import Survey
from t2i_align.errors import UserError

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

SHARD_BYTES = 256 << 20  # what a shard may hold in memory while it is written
MAX_ROWS_PER_SHARD = 1024
BATCHES_AT_ONCE = 8  # between the last of these and the next ones, the encoder waits for images; clips go one by one

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


class Item(NamedTuple):
    """A micro-batch as the loader hands it over, floats in half precision: latents [B, k, ...], conditioning [B, ...].

    captions [B, k, ...], negative_caption [B, ...] and sizes [B, k, 6] as in `Batch`.
    """

    keys: tuple[str, ...]
    scores: Tensor
    latents: Tensor
    conditioning: Conditioning
    captions: Conditioning | None = None
    negative_caption: Conditioning | None = None
    sizes: Tensor | None = None


def prepare(
    groups: Iterable[Group | Skipped],
    pipeline: TrainablePipeline,
    out: Path,
    *,
    fingerprint: Parts,
    height: int,
    width: int,
    frames: int | None = None,
    fps: float | None = None,
    batch_size: int = 8,
    progress: bool = True,
    survey: Survey | None = None,
    limit: Limit | None = None,
    may_be_empty: bool = False,
) -> None:
    """Encode groups into a cache at `out`; continue one that was killed; leave a finished one as it is.

    Args:
        groups: as `readers.read` gives them, in the same order each time.
        fingerprint: named parts that decide what a cache holds (see `source.fingerprint_parts`).
        height, width, frames, fps: how candidates are wanted; see `clips.MediaSize`.
        batch_size: images the VAE encodes at once; clips go one by one.
        survey: what the source holds, for the estimate of disk space and the progress bar's end.

    Raises:
        PipelineError: a size the VAE cannot take. UserError: another fingerprint, no space, nothing usable.
    """
    payload = Latents(pipeline, MediaSize(height, width, frames, fps), batch_size)
    texts = 1 if survey is None else survey.texts_per_group
    row_bytes = 2 * payload.latent_bytes + texts * payload.prompt_bytes
    if survey is not None:
        check_space(out, survey, payload, limit)
    write(
        groups,
        payload,
        out,
        fingerprint=fingerprint,
        rows_per_shard=max(1, min(MAX_ROWS_PER_SHARD, SHARD_BYTES // row_bytes)),
        rows_at_once=max(1, batch_size) * (BATCHES_AT_ONCE if frames is None else 1),
        total=survey.rows if survey is not None else None,
        limit=limit,
        progress=progress,
        what="encode",
        may_be_empty=may_be_empty,
    )


class LatentShard(Shard):
    """A shard with latents [candidates, ...] and embeddings [prompts, ...] as arrays over the mapped file."""

    def __init__(self, folder: Path, latent_shape: Sequence[int], layout: Layout) -> None:
        super().__init__(folder)
        column, prompts = self.groups["latents"], read_table(folder / PROMPTS)
        self.starts = np.from_dlpack(column.offsets)
        self.latents = _array(column.values, np.dtype(np.float16), latent_shape)
        self.sizes: np.ndarray | None = None
        if "sizes" in self.groups.schema.names:
            self.sizes = np.from_dlpack(self.groups["sizes"].values).reshape(-1, 2)
        self.embeddings = {
            name: _array(prompts[f"embedding:{name}"], dtype, shape) for name, (shape, dtype) in layout.items()
        }


class CachedGroups(Store):
    """A finished latent cache; `fetch` gives micro-batches. See `prepare` and `open_cache`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self.manifest.get("content") != CONTENT:
            raise UserError(f"{path}: this folder holds {self.manifest.get('content')!r}, expected {CONTENT!r}")
        self.extent = MediaSize(**self.manifest["extent"])
        self.latent_shape = tuple(self.manifest["latent_shape"])
        self.layout: Layout = {
            name: (tuple(entry["shape"]), np.dtype(entry["dtype"]))
            for name, entry in self.manifest["conditioning"].items()
        }

    def open_shard(self, folder: Path) -> LatentShard:
        return LatentShard(folder, self.latent_shape, self.layout)

    def latents(self, number: int) -> np.ndarray:
        """A group's latents [k, *latent shape], float16, best first, over the mapped file."""
        shard, row = self.group(number)
        return shard.latents[shard.starts[row] : shard.starts[row + 1]]

    def sizes(self, number: int) -> list[list[int]] | None:
        """What the model is told of each candidate's size and crop, [k, 6], best first."""
        shard, row = self.group(number)
        if shard.sizes is None:
            return None
        own = shard.sizes[shard.starts[row] : shard.starts[row + 1]].tolist()
        return [time_ids((height, width), self.extent.height, self.extent.width) for height, width in own]

    def embedding(self, text: int) -> dict[str, np.ndarray]:
        """A text's conditioning without the batch dimension, over the mapped file. Text 0 is the empty one."""
        shard, row = self.prompt_row(text)
        return {name: array[row] for name, array in shard.embeddings.items()}

    def fetch(self, rows: Sequence[Position], pairs: bool = False, columns: Sequence[str] = ()) -> Item:
        """The micro-batch of groups (epoch, number): all their k candidates, or as `pairs` the best and the worst.

        columns: what to add of `captions` and `negative_caption`.
        """
        keys, scores, latents, sizes = [], [], [], []
        numbers = [number for _, number in rows]
        for epoch, number in rows:
            shard, row = self.group(number)
            taken = self.taken(number, pairs)
            keys.append(f"{epoch}/{shard.ids[row].as_py()}")
            scores.append(shard.scores_of(row)[taken])
            latents.append(self.latents(number)[taken])
            if (told := self.sizes(number)) is not None:
                sizes.append(told[taken])
        captions = negative = None
        if "captions" in columns:
            captions = self._conditioning(np.stack([self.captions(n)[self.taken(n, pairs)] for n in numbers]))
        if "negative_caption" in columns:
            negative = self._conditioning(self.negative_caption[numbers])
        return Item(
            keys=tuple(keys),
            scores=torch.from_numpy(np.stack(scores)).float(),
            latents=torch.from_numpy(np.stack(latents)),
            conditioning=self._conditioning(self.prompt[numbers]),
            captions=captions,
            negative_caption=negative,
            sizes=torch.tensor(sizes).float() if sizes else None,
        )

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        """The micro-batch on its device, in float32."""
        return Batch(
            keys=item.keys,
            latents=_widened(item.latents, device),
            scores=item.scores.to(device, non_blocking=True),
            conditioning=_all_widened(item.conditioning, device),
            columns={
                name: _all_widened(value, device)
                for name, value in {"captions": item.captions, "negative_caption": item.negative_caption}.items()
                if value is not None
            },
            sizes=None if item.sizes is None else _widened(item.sizes, device),
        )

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...], float32."""
        return {name: _widened(torch.tensor(array[None]), device) for name, array in self.embedding(0).items()}

    def _conditioning(self, texts: np.ndarray) -> Conditioning:
        """The conditioning [*texts.shape, ...] of texts by their numbers."""
        found = [self.embedding(text) for text in texts.ravel().tolist()]
        return {
            name: torch.from_numpy(np.stack([embedding[name] for embedding in found]).reshape(*texts.shape, *shape))
            for name, (shape, _) in self.layout.items()
        }


def open_cache(path: Path) -> CachedGroups:
    """Open a finished cache; raises UserError where there is none, or where a part of it is missing."""
    return CachedGroups(path)


def check_space(out: Path, survey: Survey, payload: Latents, limit: Limit | None) -> None:
    """Raise UserError where a cache at `out`, less what is there of it, is not expected to fit on the disk."""
    share = 1.0 if limit is None else min(1.0, limit.groups / max(1, survey.groups))
    candidates = sum(k * count for k, count in survey.candidates.items())
    needed = share * candidates * payload.latent_bytes
    needed += (min(len(survey.texts), share * survey.groups * survey.texts_per_group) + 1) * payload.prompt_bytes
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    stored = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.exists() else 0
    free = shutil.disk_usage(folder).free
    if needed - stored > free:
        raise UserError(
            f"{out}: the cache needs about {readable(needed - stored)}, but only {readable(free)} are free there. "
            "Choose another folder with data.cache_dir, a smaller data.limit or data.resolution, or data.cache=false."
        )


def _array(column: pa.Array, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """A fixed-size binary column as [rows, *shape] without a copy."""
    if len(column) == 0:
        return np.empty((0, *shape), dtype)
    count = len(column) * int(np.prod(shape))
    return np.frombuffer(column.buffers()[1], dtype, count).reshape(len(column), *shape)


def _widened(tensor: Tensor, device: torch.device) -> Tensor:
    # Half precision crosses to the device and is widened there.
    moved = tensor.to(device, non_blocking=True)
    return moved.float() if moved.is_floating_point() else moved


def _all_widened(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return {name: _widened(tensor, device) for name, tensor in conditioning.items()}
