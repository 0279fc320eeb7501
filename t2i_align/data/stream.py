"""What does not fit on disk, a window at a time: an endless stream of batches that resumes exactly.

A source in pieces (shards, here or on the Hub) is read in an order drawn for each epoch, so many rows at a time. Each
such window becomes an index of images on disk (see `live`); its groups are shuffled among each other, and the windows
before it are deleted. Where a window begins and how many usable groups it has is written down: so a run that is resumed
finds its window, has it read again, and goes on with the very next group. A stream of `datasets` with a shuffle buffer
would lose what is in the buffer.

    <folder>/<seed>/windows.jsonl        {"epoch", "window", "start": [piece, row], "next": [piece, row], "groups"}
                    skipped.jsonl        the rows of all windows that could not be used, and why
                    000000-000003/       the window, as `shards.write` leaves it
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from t2i_align.data import hub, readers, tables
from t2i_align.data.layout import MANIFEST, SKIPPED
from t2i_align.data.live import LiveGroups, LiveItem
from t2i_align.data.schema import Batch, Conditioning, Group, Items, Skipped
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.objectives.base import DataStats

KEPT = 3  # windows: processes are not at the same batch, and the loader's workers run ahead
Place = tuple[int, int]  # (piece in the epoch's order, row in it)
Position = tuple[int, int, int]  # (epoch, window, group)


@dataclass(frozen=True)
class Pieces:
    """The files that make up a source, read one at a time. remote: their data set, if they are on the Hub."""

    names: tuple[str, ...]
    format: str
    remote: str | None = None

    @classmethod
    def of(cls, path: str, format: str, folder: Path) -> Pieces:
        """The pieces of a source: its shards, or where it has none, itself. `folder` is for what must be downloaded."""
        if path.startswith(hub.PREFIX):
            names, remote = hub.pieces(path, tables.SHARDED)
            file = hub.piece(remote, names[0], folder)
            return cls(tuple(names), readers.detect(file, format), remote)
        local = readers.resolve(path)
        return cls(tuple(map(str, tables.files(local) or [local])), readers.detect(local, format))

    @property
    def identity(self) -> str:
        """What tells this source from another."""
        if self.remote is not None:
            return " ".join([self.remote, *self.names])
        return " ".join(readers.identity(Path(name), self.format) for name in self.names)

    def items(self, number: int, folder: Path) -> Items:
        """The groups and skipped rows of a piece; of the Hub, it is in `folder` for as long as it is read."""
        name = self.names[number]
        if self.remote is None:
            yield from readers.read(name, self.format)
            return
        file = hub.piece(self.remote, name, folder)
        try:
            yield from readers.read(file, self.format)
        finally:
            file.unlink(missing_ok=True)


class StreamedSource:
    """What `source.Source` is to a trainer, for a stream.

    Args:
        rows: source rows a window.
        index: writes items to a folder as an index of images. open_window: opens it, ready to encode.
        usable: the numbers of those groups of a window that serve the objective.
        pairs, columns: as of `Source`.
        fingerprint: of the source, the window's size and what the objective needs.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        rows: int,
        folder: Path,
        index: Callable[[Items, Path], None],
        open_window: Callable[[Path], LiveGroups],
        usable: Callable[[LiveGroups], np.ndarray],
        pairs: bool,
        columns: Sequence[str],
        fingerprint: str,
    ) -> None:
        self.pieces, self.rows, self.folder, self.index, self.open_window = pieces, rows, folder, index, open_window
        self.usable, self.pairs, self.columns, self.fingerprint = usable, pairs, columns, fingerprint
        first = Windows(self, seed=0)
        self.groups = first.opened(0, 0)
        numbers = usable(self.groups)
        if not len(numbers):
            raise UserError(f"{pieces.names[0]}: of the first {rows} rows, none serves this objective")
        self.scores = float(self.groups.worst[numbers].min()), float(self.groups.best[numbers].max())
        self.counts = {"groups in the first window": len(numbers), "pieces": len(pieces.names)}

    def loader(
        self, *, seed: int, start_step: int, batch_size: int, accumulate: int, rank: int, world: int, workers: int
    ) -> Iterator[LiveItem]:
        """Endless micro-batches of this process, cut from the stream as `sampling.StreamSampler` cuts them."""
        windows = Windows(self, seed)
        loader: DataLoader[Any] = DataLoader(
            _Groups(windows.root, self.groups, self.pairs, self.columns),
            batch_sampler=_Cut(windows, start_step, batch_size, rank, world, accumulate),
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_leave_interrupts_to_the_run,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        return iter(loader)

    def to_batch(self, item: LiveItem, device: torch.device) -> Batch:
        """A micro-batch, encoded, on its device."""
        return self.groups.to_batch(item, device)

    def facts(self) -> DataStats:
        """What an objective may be fitted to; of the first window, as nobody has seen the rest."""
        return DataStats(score_range=self.scores)

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...]."""
        return self.groups.empty_conditioning(device)


class Windows:
    """The windows of one run's order, made when they are asked for."""

    def __init__(self, source: StreamedSource, seed: int) -> None:
        self.source, self.seed = source, seed
        self.root = source.folder / str(seed)
        self.root.mkdir(parents=True, exist_ok=True)
        self.list = self.root / "windows.jsonl"

    def positions(self, start: int) -> Iterator[Position]:
        """The groups of the stream from a position on; a window is there once one of its groups has been given out."""
        for epoch, window, groups in self._sizes():
            if start >= groups:
                start -= groups
                continue
            found = self.opened(epoch, window)
            numbers = self.source.usable(found)
            generator = torch.Generator().manual_seed(stable_seed(self.seed, "window", epoch, window))
            order = torch.randperm(len(numbers), generator=generator).tolist()
            yield from ((epoch, window, int(numbers[place])) for place in order[start:])
            start = 0

    def opened(self, epoch: int, window: int) -> LiveGroups:
        """A window, which is made if it is not there, and written down if it was not."""
        folder = self.root / window_name(epoch, window)
        with FileLock(self.root / ".lock"):  # of several processes one makes it, the others wait
            if not (folder / MANIFEST).exists():
                self._make(epoch, window, folder)
            return self.source.open_window(folder)

    def _sizes(self) -> Iterator[tuple[int, int, int]]:
        """Epoch, window and number of usable groups, of each in turn; those that nobody has seen yet are made."""
        epoch = window = 0
        while True:
            known = self._known()
            if (epoch, window) not in known:
                self.opened(epoch, window)
                known = self._known()
            entry = known[epoch, window]
            yield epoch, window, entry["groups"]
            epoch, window = (epoch, window + 1) if entry["next"] else (epoch + 1, 0)

    def _known(self) -> dict[tuple[int, int], dict[str, Any]]:
        if not self.list.exists():
            return {}
        lines = self.list.read_text().split("\n")[:-1]  # what a kill cut short is not a line
        entries = [json.loads(line) for line in lines]
        return {(entry["epoch"], entry["window"]): entry for entry in entries}

    def _make(self, epoch: int, window: int, folder: Path) -> None:
        known = self._known()
        start: Place = (0, 0)
        if window:
            piece, row = known[epoch, window - 1]["next"]
            start = piece, row
        shutil.rmtree(folder, ignore_errors=True)  # it may have been begun when something else was missing
        reading = _Reading(self, epoch, start)
        self.source.index(reading.rows(self.source.rows), folder)
        if (epoch, window) not in known:
            groups = len(self.source.usable(self.source.open_window(folder)))
            entry = {"epoch": epoch, "window": window, "start": start, "next": reading.next, "groups": groups}
            text = self.list.read_bytes() if self.list.exists() else b""
            with open(self.root / SKIPPED, "ab") as sink:
                sink.write((folder / SKIPPED).read_bytes())
            with open(self.list, "rb+" if text else "wb") as stream:
                stream.truncate(text.rfind(b"\n") + 1)
                stream.seek(0, 2)
                stream.write((json.dumps(entry) + "\n").encode())
        names = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and "-" in entry.name)
        for old in names[: max(0, names.index(folder.name) + 1 - KEPT)]:
            shutil.rmtree(self.root / old)

    def order(self, epoch: int) -> list[int]:
        """The pieces' numbers as an epoch reads them."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "pieces", epoch))
        return torch.randperm(len(self.source.pieces.names), generator=generator).tolist()


class _Reading:
    """One walk over the rows of a window. next: where the one after it begins; None at the end of the epoch."""

    def __init__(self, windows: Windows, epoch: int, start: Place) -> None:
        self.windows, self.order, self.start = windows, windows.order(epoch), start
        self.next: Place | None = None

    def rows(self, count: int) -> Items:
        """The window's rows; after the last of them, `next` is known."""
        items = self._all()
        for _, item in islice(items, count):
            yield item
        after = next(items, None)
        self.next = after[0] if after else None

    def _all(self) -> Iterator[tuple[Place, Group | Skipped]]:
        first, skip = self.start
        for piece in range(first, len(self.order)):
            items = self.windows.source.pieces.items(self.order[piece], self.windows.root / "pieces")
            for row, item in enumerate(items):
                if row >= skip:
                    yield (piece, row), item
            skip = 0


class _Cut(Sampler[list[Position]]):
    """The micro-batches of one process; see `sampling.StreamSampler` for which these are."""

    def __init__(
        self, windows: Windows, start_step: int, batch_size: int, rank: int, world: int, accumulate: int
    ) -> None:
        self.windows, self.batch_size = windows, batch_size
        self.stride = batch_size * world
        self.start = start_step * accumulate * self.stride
        self.own = slice(rank * batch_size, (rank + 1) * batch_size)

    def __iter__(self) -> Iterator[list[Position]]:
        positions = self.windows.positions(self.start)
        while True:
            yield list(islice(positions, self.stride))[self.own]


class _Groups(Dataset[Any]):
    """Groups by their positions, a whole micro-batch at a time, out of one window or two."""

    def __init__(self, root: Path, example: LiveGroups, pairs: bool, columns: Sequence[str]) -> None:
        self.root, self.state, self.pairs, self.columns = root, example.__getstate__(), pairs, columns
        self._opened = lru_cache(maxsize=2)(self._open)

    def __getitem__(self, position: Position) -> LiveItem:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[Position]) -> LiveItem:
        parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for epoch, window, number in positions:
            parts.setdefault((epoch, window), []).append((epoch, number))
        return joined([self._opened(*at).fetch(rows, self.pairs, self.columns) for at, rows in parts.items()])

    def _open(self, epoch: int, window: int) -> LiveGroups:
        found = LiveGroups.__new__(LiveGroups)
        found.__setstate__({**self.state, "path": self.root / window_name(epoch, window)})
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "state": self.state, "pairs": self.pairs, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=lru_cache(maxsize=2)(self._open))


def joined(items: Sequence[LiveItem]) -> LiveItem:
    """Micro-batches as one.

    Raises:
        UserError: their groups do not have the same number of candidates.
    """
    if len(items) == 1:
        return items[0]
    if len({item.scores.shape[1] for item in items}) > 1:
        raise UserError("for this objective, groups must have the same number of candidates; the stream has several")
    columns: list[Any] = []
    for values in zip(*items, strict=True):
        if values[0] is None:
            columns.append(None)
        elif isinstance(values[0], Tensor):
            columns.append(torch.cat(values))
        else:
            columns.append([value for part in values for value in part])
    columns[0] = tuple(columns[0])
    return LiveItem(*columns)


def window_name(epoch: int, window: int) -> str:
    return f"{epoch:06d}-{window:06d}"


def _leave_interrupts_to_the_run(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run saves a checkpoint first, for which it still needs them


def _as_it_is(item: Any) -> Any:
    return item
