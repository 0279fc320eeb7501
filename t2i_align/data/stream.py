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
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch

from t2i_align.config import DataConfig
from t2i_align.data import hub, layouts, opening, readers
from t2i_align.data.annotations import Annotations, sidecar_identity
from t2i_align.data.batch import Batch, Conditioning
from t2i_align.data.encode import latent_times
from t2i_align.data.loader import Item, PreferenceDataset, encode_fields, time_ids, widened
from t2i_align.data.media import ImageError, Loaded, MediaSize, load, to_bytes
from t2i_align.data.opening import Survey, warn_of_cut_texts
from t2i_align.data.schema import COLUMNS, Group, Items, Selection, Skipped
from t2i_align.data.segments import by_latent_frame, unlabelled
from t2i_align.data.shards import SHARDED
from t2i_align.data.tables import files
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
    encoder_fingerprint: str,
    size: MediaSize,
    selection: Selection,
    annotations: Annotations,
    cache_root: Path,
) -> PreferenceDataset:
    """The configured data, encoded on the fly; see `opening.open_dataset`."""
    downloads = cache_root / "stream-shards" if data.stream and data.path.startswith(hub.PREFIX) else None
    shards = Shards.of(data.path, data.format, annotations, downloads)
    survey = shards.survey(selection)
    survey.check_usable(data.path)
    needs.check(survey, data.path, alike=data.limit is None)
    if unusable := survey.skips.total():
        logger.warning("%s: %d rows cannot be used, such as %s", data.path, unusable, "; ".join(survey.reasons))
    fingerprint = {
        "source": survey.identity,
        "annotations": sidecar_identity(data.annotations),
        "reader": shards.format,
        "window": data.stream,
        "selection": vars(selection),
        "frames": size.frames,
        "fps": size.fps,
        "encoders": encoder_fingerprint,
    }
    counts = {"groups": survey.accepted, "skipped": unusable, **needs.left_out(survey)}
    if shards.remote:
        counts = {"groups in the first shard": survey.accepted, "shards": len(shards.names)}
    encoders = pipeline()
    warn_of_cut_texts(encoders, [*survey.texts])
    return Stream(shards, size, selection, data.stream, encoders, needs, counts=counts,
                  score_range=survey.score_range, fingerprint=fingerprint)  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """The files that make up a source, read one at a time.

    names: of the files below `root`; the only one of a source that is read whole is "".
    remote: the data set on the Hub; each of its files is downloaded to a folder of its own below `root`.
    """

    root: Path
    names: Sequence[str]
    format: str
    annotations: Annotations
    remote: str | None = None

    @classmethod
    def of(cls, path: str, format: str, annotations: Annotations, downloads: Path | None) -> Shards:
        """The shards of a source: its files, where rows do not depend on those of other files.

        downloads: the folder for those of a source on the Hub that are not downloaded together.
        """
        if downloads:
            names, remote = hub.pieces(path, SHARDED)
            format = readers.detect(hub.piece(remote, names[0], downloads / "0"), format)
            return cls(downloads, names, format, annotations, remote)
        root = readers.resolve(path)
        format = readers.detect(root, format)
        layout = layouts.PUBLISHED.get(format, ())
        apart = root.is_dir() and layout and not any(columns.group for columns in layout)
        names = [file.relative_to(root).as_posix() for file in files(root)] if apart else []
        return cls(root, names or [""], format, annotations)

    def survey(self, selection: Selection) -> Survey:
        """What the source holds; on the Hub, what its shards up to the first with a usable group hold."""
        if self.remote is None:
            return opening.survey(self.root, self.format, self.annotations, selection)
        for number in range(len(self.names)):
            path, part = self.located(number)
            survey = opening.survey(path, self.format, selection=selection, part=part)
            if survey.accepted:
                break
        return replace(survey, identity=" ".join([self.remote, *self.names]))

    def items(self, number: int, *, images: bool = True) -> Items:
        """The groups and skipped rows of a shard, with the ids that they have in the whole source."""
        root, part = self.located(number)
        return readers.read(root, self.format, self.annotations, images=images, part=part)

    def located(self, number: int) -> tuple[Path, Path | None]:
        """The path of the source and the shard below it, downloaded where it is not there; None for the whole."""
        name = self.names[number]
        if self.remote is None:
            return self.root, self.root / name if name else None
        root = self.root / str(number)
        return root, root / name if (root / name).exists() else hub.piece(self.remote, name, root)

    def discard(self, number: int) -> None:
        """Delete what was downloaded of a shard."""
        if self.remote is not None:
            (self.root / str(number) / self.names[number]).unlink(missing_ok=True)


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
        self.times = latent_times(pipeline, size.frames, size.fps)
        self._rows: dict[int, np.ndarray] = {}  # of each shard, when it has been looked through
        self._windows: dict[tuple[int, int], list[Group | Skipped]] = {}
        self._open: dict[tuple[int, int], Items] = {}  # at the beginning of which window a shard's items are
        self.used = len(shards.names)
        if (left := selection.limit) is not None:
            self.used = 0
            while left and self.used < len(shards.names):
                rows = self._rows[self.used] = self._usable(self.used, left)
                left, self.used = left - len(rows), self.used + 1

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
        columns: dict[str, Any] = {
            name: [group.columns[name] for group in groups] for name in self.needs.columns if name in COLUMNS
        }
        if "segment_scores" in columns:
            columns = by_latent_frame(columns, self.times)
        sizes = [[time_ids(one.size, self.size.height, self.size.width) for one in loaded] for loaded in decoded]
        return {
            "keys": [f"{epoch}/{group.id}" for (epoch, _, _), group in zip(positions, groups, strict=True)],
            "scores": torch.tensor([group.scores for group in groups]),
            "pixels": torch.stack([torch.stack([to_bytes(one.pixels) for one in loaded]) for loaded in decoded]),
            "sizes": torch.tensor(sizes).float() if self.size_conditioned else None,
            "prompts": [group.prompt for group in groups],
            "columns": columns,
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

    def some_prompts(self, count: int) -> list[str]:
        groups = filter(self._accepts, self.shards.items(0, images=False))
        distinct: dict[str, None] = {}
        for group in groups:
            distinct[group.prompt] = None
            if len(distinct) == count:
                break
        return list(distinct)

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        conditioning: Conditioning = widened(dict(self.pipeline.encode_prompts([""])), device)
        return conditioning

    def _positions(self, seed: int, start: int) -> Iterator[Position]:
        """The stream from a position on. Whole shards before it are passed over by their number of usable groups."""
        recent: list[int] = []
        for epoch in count():
            for shard in permutation(self.used, seed, "shards", epoch).tolist():
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
                    whole = self.used == 1 and len(own) == len(rows)
                    order = permutation(len(own), seed, "order", epoch, *(() if whole else (shard, window))).tolist()
                    yield from ((epoch, shard, int(own[n])) for n in order[start:])
                    start = max(0, start - len(own))
                recent.append(shard)
                if len(recent) > KEPT and (old := recent.pop(0)) not in recent:
                    self.shards.discard(old)
            if not any(map(len, self._rows.values())):
                raise UserError(f"{self.shards.root}: no group in the source serves this objective")

    def _usable(self, shard: int, limit: int | None = None) -> np.ndarray:
        """The rows of a shard that hold groups which the objective can use, the first so many of them."""
        items = enumerate(self.shards.items(shard, images=False))
        rows = (row for row, item in items if self._accepts(item) and not self._texts_alike(item))
        return np.fromiter(islice(rows, limit), np.int64)

    def _texts_alike(self, group: Group) -> bool:
        """Whether the encoder cannot tell texts apart that the objective compares."""
        for column in self.needs.compared_texts:
            one, *_, other = [
                *([] if column.per_candidate else [group.prompt]),
                *column.texts(group.columns[column.name]),
            ]
            shared = column.per_candidate and one == other  # candidates may share a text
            if not shared and len({*self.pipeline.tokens_read([one, other])}) == 1:
                logger.warning("%s: left out: the encoder reads the same tokens of both texts", group.origin)
                return True
        return False

    def _accepts(self, item: Group | Skipped) -> TypeGuard[Group]:
        return isinstance(item, Group) and self.selection.accepts(item)

    def _decoded(self, shard: int, row: int) -> tuple[Group, list[Loaded]]:
        """The group at a position, and its candidates; if these are damaged, the next group of its window.

        What comes at a position depends on nothing else, so that a resumed run and other processes agree on it.
        """
        window = self._window(shard, row // self.window)
        at = row % self.window
        for group in filter(self._accepts, (*window[at:], *window[:at])):
            group = group.take(self.needs.places(len(group.candidates)))
            try:
                if group.segment_scores and (reason := unlabelled(group, self.times)):
                    raise ImageError(reason)
                return group, [load(media, self.size) for media in group.candidates]
            except ImageError as error:
                logger.warning("%s: %s; the next group stands in for it", group.origin, error)
        raise UserError(f"{self.shards.root / self.shards.names[shard]}: no image around row {row} can be decoded")

    def _window(self, shard: int, window: int) -> list[Group | Skipped]:
        """A window's rows; shards are mostly read in sequence, so that the next window continues where one ended."""
        if (shard, window) not in self._windows:
            items = self._open.get((shard, window)) or islice(
                self.shards.items(shard), window and window * self.window, None
            )
            self._open = {(shard, window + 1): items}
            self.shards.located(shard)  # some readers open it once more, and it may have been deleted meanwhile
            before = dict(list(self._windows.items())[-1:])  # a micro-batch may straddle two
            self._windows = {**before, (shard, window): list(islice(items, self.window))}
        return self._windows[shard, window]

    def __getstate__(self) -> dict[str, Any]:
        # Workers decode; the pipeline stays here.
        return {**vars(self), "pipeline": None, "_open": {}, "_windows": {}}
