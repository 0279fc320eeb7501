"""On the fly: shards of a source in a shuffled order, candidates decoded by the loader and encoded with each batch.

A shard is a file of the source, here or on the Hub, or the whole source where it is not in several files. An epoch
goes through a permutation of the shards, and within each through a permutation of its rows; large shards are cut into
windows of so many rows, since those are held in memory. A position is (epoch, shard, row), so that a run that is
resumed goes on with the very next group. Nothing is written, but shards of the Hub are there while they are read.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from t2i_align.config import DataConfig
from t2i_align.data import hub, layouts, readers, tables
from t2i_align.data.annotations import NONE, Annotations, sidecar_identity
from t2i_align.data.encode import encode_fields, widened
from t2i_align.data.loader import Item, PreferenceDataset
from t2i_align.data.media import ImageError, Loaded, MediaSize, load, time_ids, to_bytes
from t2i_align.data.schema import COLUMNS, Batch, Conditioning, Group, Items, Selection, Skipped
from t2i_align.diffusion.randomness import permutation
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

logger = logging.getLogger(__name__)
KEPT = 2  # shards of the Hub behind the one that is read: the loader's workers and other processes may still read these
Position = tuple[int, int, int]  # (epoch, shard, row)


def open_stream(
    data: DataConfig,
    needs: Requirements,
    pipeline: Callable[[], TrainablePipeline],
    size: MediaSize,
    selection: Selection,
    annotations: Annotations,
    cache_root: Path,
) -> PreferenceDataset:
    """The configured data, encoded on the fly; see `loader.open_dataset`."""
    shards = Shards.of(data.path, data.format, cache_root / "stream-shards", annotations)
    # Of what does not fit on disk, only shards up to the first with a usable group are looked through beforehand.
    for file in map(shards.file, range(len(shards.names))) if data.stream else [data.path]:
        survey = readers.survey(file, shards.format, annotations, selection)
        if survey.accepted:
            break
    needs.check(survey, data.path, alike=data.limit is None)
    unusable = survey.rows - survey.groups
    if unusable:
        logger.warning("%s: %d rows cannot be used, such as %s", data.path, unusable, "; ".join(survey.reasons))
    fingerprint = {
        "source": shards.identity(selection) if data.stream else survey.identity,
        "annotations": sidecar_identity(data.annotations),
        "reader": shards.format,
        "window": data.stream,
        "selection": vars(selection),
        "frames": size.frames,
        "fps": size.fps,
    }
    counts = {"groups": survey.accepted, "skipped": unusable, **needs.left_out(survey)}
    if data.stream:
        counts = {"groups in the first shard": survey.accepted, "shards": len(shards.names)}
    return Stream(shards, size, selection, data.stream, pipeline(), needs, counts=counts,
                  score_range=survey.score_range, fingerprint=fingerprint)  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """The files that make up a source, read one at a time. remote: their data set, if they are on the Hub."""

    names: tuple[str, ...]
    format: str
    folder: Path
    remote: str | None = None
    annotations: Annotations = NONE

    @classmethod
    def of(cls, path: str, format: str, downloads: Path, annotations: Annotations = NONE) -> Shards:
        """The shards of a source. downloads: the folder for those of the Hub."""
        if path.startswith(hub.PREFIX):
            names, remote = hub.pieces(path, tables.SHARDED)
            return cls(tuple(names), readers.detect(hub.piece(remote, names[0], downloads), format), downloads, remote)
        local = readers.resolve(path)
        return cls(("",), readers.detect(local, format), local, annotations=annotations)._split()

    def identity(self, selection: Selection) -> str:
        """A fingerprint of the source, as far as a limit lets it be read."""
        if self.remote is not None:
            return " ".join([self.remote, *self.names])
        return readers.survey(self.folder, self.format, selection=selection).identity

    def items(self, number: int, *, images: bool = True) -> Items:
        """The groups and skipped rows of a shard, with the ids that they have in the whole source."""
        name = Path(self.names[number])
        for item in readers.read(self.file(number), self.format, self.annotations, images=images):
            nested = len(name.parts) > 1 and item.id.startswith(f"{name.name}:")
            yield replace(item, id=(name.parent / item.id).as_posix()) if nested else item

    def file(self, number: int) -> Path:
        """A shard, downloaded where it is not there."""
        file = self.folder / self.names[number]
        return file if self.remote is None or file.exists() else hub.piece(self.remote, self.names[number], self.folder)

    def discard(self, number: int) -> None:
        """Delete what was downloaded of a shard."""
        if self.remote is not None:
            (self.folder / self.names[number]).unlink(missing_ok=True)

    def _split(self) -> Shards:
        """One shard per file where rows do not depend on those of other files."""
        files = tables.files(self.folder) if self.folder.is_dir() else []
        layout = layouts.PUBLISHED.get(self.format, ())
        apart = bool(layout) and not any(columns.group for columns in layout)
        names = tuple(file.relative_to(self.folder).as_posix() for file in files)
        if not apart or not names or (self.annotations.entries and any("/" in name for name in names)):
            return self
        return replace(self, names=names)


class Stream(PreferenceDataset):
    """The groups of a source's shards that an objective can use.

    Args:
        size: target size of candidates.
        selection: which groups are used; its limit takes the first so many of the source.
        window: rows that are held in memory at a time, and shuffled among each other (default: all of a shard).

    Raises:
        PipelineError: a size that the pipeline cannot take.
    """

    def __init__(
        self,
        shards: Shards,
        size: MediaSize,
        selection: Selection,
        window: int | None,
        pipeline: TrainablePipeline,
        needs: Requirements,
        **facts: Any,
    ) -> None:
        super().__init__(needs, **facts)
        pipeline.check_size(size.height, size.width, size.frames)
        self.shards, self.size, self.selection, self.window = shards, size, selection, window or sys.maxsize
        self.pipeline, self.size_conditioned = pipeline, pipeline.size_conditioned
        self.used = range(len(shards.names))
        self._rows: dict[int, np.ndarray] = {}  # of each shard, when it has been looked through
        self._windows: dict[tuple[int, int], list[Group | Skipped]] = {}
        self._reading: tuple[int, int, Items] | None = None  # shard, the window that comes next, its items
        left = selection.limit
        for shard in self.used:
            if left is None or left == 0:
                break
            self._rows[shard] = self._usable(shard, left)
            left -= len(self._rows[shard])
            self.used = range(shard + 1)

    def steps(self, *, seed: int, size: int, start: int) -> Iterator[list[Position]]:
        """`size` consecutive positions of the stream for each optimiser step."""
        positions = self._positions(seed, start * size)
        while True:
            yield list(islice(positions, size))

    def __getitems__(self, positions: Sequence[Position]) -> Item:
        """A micro-batch, decoded: pixels [B, k, 3, H, W] or [B, k, F, 3, H, W] of 8 bits, and its texts."""
        groups, decoded = zip(*(self._decoded(shard, row) for _, shard, row in positions), strict=True)
        if len({len(loaded) for loaded in decoded}) > 1:
            raise UserError("for this objective, groups must have the same number of candidates")
        sizes = [[time_ids(one.size, self.size.height, self.size.width) for one in loaded] for loaded in decoded]
        return {
            "keys": [f"{epoch}/{group.id}" for (epoch, _, _), group in zip(positions, groups, strict=True)],
            "scores": torch.tensor([group.scores for group in groups]),
            "pixels": torch.stack([torch.stack([to_bytes(one.pixels) for one in loaded]) for loaded in decoded]),
            "sizes": torch.tensor(sizes).float() if self.size_conditioned else None,
            "prompts": [group.prompt for group in groups],
            "columns": {
                name: [group.columns[name] for group in groups] for name in self.needs.columns if name in COLUMNS
            },
        }

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        """Encode the micro-batch, in float32 on its device: images together, clips one by one."""
        pixels = item["pixels"].flatten(0, 1)
        latents = torch.cat([
            widened(self.pipeline.encode_pixels(part.float() / 255), device)
            for part in pixels.split(len(pixels) if self.size.frames is None else 1)
        ])  # fmt: skip
        return Batch(
            keys=tuple(item["keys"]),
            latents=latents.unflatten(0, item["pixels"].shape[:2]),
            scores=widened(item["scores"], device),
            sizes=widened(item["sizes"], device),
            **widened(encode_fields(self.pipeline.encode_prompts, item["prompts"], item["columns"]), device),
        )

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        conditioning: Conditioning = widened(dict(self.pipeline.encode_prompts([""])), device)
        return conditioning

    def _positions(self, seed: int, start: int) -> Iterator[Position]:
        """The stream from a position on. Whole shards before it are passed over by their number of usable groups."""
        recent: list[int] = []
        for epoch in count():
            for place in permutation(len(self.used), seed, "shards", epoch).tolist():
                shard = self.used[place]
                if shard not in self._rows:
                    self._rows[shard] = self._usable(shard)
                rows = self._rows[shard]
                if start >= len(rows):
                    start -= len(rows)
                    self.shards.discard(shard)
                    continue
                for window in np.unique(rows // self.window).tolist():
                    own = rows[rows // self.window == window]
                    # A source that is one window has the order of prepared data.
                    whole = len(self.used) == 1 and len(own) == len(rows)
                    order = permutation(len(own), seed, "order", epoch, *(() if whole else (shard, window))).tolist()
                    yield from ((epoch, shard, int(own[n])) for n in order[start:])
                    start = max(0, start - len(own))
                recent.append(shard)
                if len(recent) > KEPT and (old := recent.pop(0)) not in recent:
                    self.shards.discard(old)
            if not any(map(len, self._rows.values())):
                raise UserError(f"{self.shards.folder}: no group in the source serves this objective")

    def _usable(self, shard: int, limit: int | None = None) -> np.ndarray:
        """The rows of a shard that hold groups which the objective can use, the first so many of them."""
        rows = (
            row
            for row, item in enumerate(self.shards.items(shard, images=False))
            if isinstance(item, Group) and self.selection.accepts(item)
        )
        return np.fromiter(islice(rows, limit), np.int64)

    def _decoded(self, shard: int, row: int) -> tuple[Group, list[Loaded]]:
        """The group at a position, and its candidates; if these are damaged, the next group of its window.

        What comes at a position depends on nothing else, so that a resumed run and other processes agree on it.
        """
        window = self._window(shard, row // self.window)
        at = row % self.window
        for item in (*window[at:], *window[:at]):
            if isinstance(item, Group) and self.selection.accepts(item):
                group = item.take(self.needs.places(len(item.candidates)))
                try:
                    return group, [load(media, self.size) for media in group.candidates]
                except ImageError as error:
                    logger.warning("%s: %s; the next group stands in for it", item.origin, error)
        raise UserError(f"{self.shards.folder / self.shards.names[shard]}: no image around row {row} can be decoded")

    def _window(self, shard: int, window: int) -> list[Group | Skipped]:
        """A window's rows; shards are mostly read in sequence, so that the next window continues where one ended."""
        if (shard, window) not in self._windows:
            if self._reading is None or self._reading[:2] != (shard, window):
                self._reading = shard, window, islice(self.shards.items(shard), window and window * self.window, None)
            items = self._reading[2]
            self._reading = shard, window + 1, items
            for old in list(self._windows)[:-1]:  # a micro-batch may straddle two
                del self._windows[old]
            self.shards.file(shard)  # some readers open it once more, and it may have been deleted meanwhile
            self._windows[shard, window] = list(islice(items, self.window))
        return self._windows[shard, window]

    def __getstate__(self) -> dict[str, Any]:
        # Workers decode; the pipeline stays here.
        return {**vars(self), "pipeline": None, "_reading": None, "_windows": {}}
