"""Writing a store: groups encoded into Arrow shards by any number of processes, resumed after a kill at any instant.

    <folder>/fingerprint.json        what this folder is made from; another fingerprint is refused
             shard-00000/            complete once it has this name
                 groups.arrow        id, prompt, scores, the optional columns, and what the encoder adds
                 texts.arrow         the texts that occur in no earlier shard, encoded
                 skipped.jsonl       rows that could not be used, with the reason
                 state.json          source rows covered, counts
             index.arrow             a small row per group, to choose and shuffle without opening shards
             skipped.jsonl           all of them
             manifest.json           written last: with it, the folder is finished

A shard covers a fixed number of source rows, so that an interrupted run continues with the same result, and several
processes, on one machine or on many that share the folder, each write the next shard that no other is writing.
"""

from __future__ import annotations

import errno
import json
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm

from t2i_align.data.schema import COLUMNS, EVERYTHING, REASONS_SHOWN, Group, Selection, Skipped
from t2i_align.data.store import (
    FINGERPRINT,
    GROUPS,
    INDEX,
    INDEX_TYPES,
    LAYOUT,
    MANIFEST,
    SKIPPED,
    STATE,
    TEXTS,
    column_types,
    is_complete,
    read_table,
    shard_name,
)
from t2i_align.errors import UserError
from t2i_align.utils.files import WRITING, atomic_file, atomic_folder, claim, read_json, write_json

LOCK, LOCKS = ".lock", ".locks"  # of the folder; the folder of the shards' locks

Row = dict[str, Any]


class Encoder(ABC):
    """What is stored of a group's candidates and texts, beside the columns that all groups have.

    columns: names and types of what `encode` adds to a row. text_columns: the same of encoded texts; none where texts
    are not encoded. rows_per_shard, rows_at_once: source rows in a shard, and of these, how many are encoded together.
    description: entries of the manifest.
    """

    columns: dict[str, pa.DataType]
    text_columns: dict[str, pa.DataType] = {}
    rows_per_shard: int
    rows_at_once: int
    description: dict[str, Any] = {}

    @abstractmethod
    def encode(self, groups: Sequence[Group]) -> list[Row | str]:
        """A row of `columns` for each group, or the reason why there is none."""

    def take_texts(self) -> list[Row]:
        """Rows of `text` and `text_columns`: the texts encoded since the last call."""
        return []

    def know_texts(self, texts: Iterable[str]) -> None:  # noqa: B027
        """Note texts that are stored already, or by another process."""


def write(
    items: Iterable[Group | Skipped],
    encoder: Encoder,
    out: Path,
    *,
    fingerprint: Mapping[str, Any],
    total: int | None = None,
    selection: Selection = EVERYTHING,
    progress: bool = True,
) -> None:
    """Write all groups below `out`, or continue where an earlier call was killed; returns at once if it is finished.

    Args:
        items: best first, ids unique, in the same order in each call.
        fingerprint: named JSON values that decide what the folder holds.
        total: number of items, for the progress bar.
        selection: its limit ends the reading after so many groups that it accepts.

    Raises:
        UserError: another fingerprint, the disk is full, nothing usable, a source that has become shorter.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be used as the folder for prepared data: {error}") from error
    with FileLock(out / LOCK):
        _claim(out, fingerprint)
    # A limit counts groups from the first row on: then one process writes, and the others wait.
    limited = selection.limit is not None
    with FileLock(out / LOCK) if limited else nullcontext():
        if is_complete(out):
            return
        (out / MANIFEST).unlink(missing_ok=True)  # a shard was lost
        writer = _Writer(encoder, out, selection)
        with tqdm(total=total, desc="encode", unit="row", disable=not progress) as writer.bar:
            try:
                for lock in writer.walk(iter(items)):
                    with lock:  # held while its shard is being written
                        pass
            except FileNotFoundError:  # the locks are gone: others have finished it all in the meantime
                if not is_complete(out):
                    raise
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(f"{out}: the disk is full. What is complete stays; run again to continue.") from error
        with nullcontext() if limited else FileLock(out / LOCK):
            if not is_complete(out):
                _finish(out, fingerprint, encoder)


def _claim(out: Path, fingerprint: Mapping[str, Any]) -> None:
    others = [entry for entry in out.iterdir() if entry.name not in (LOCK, LOCKS)]
    if not (out / FINGERPRINT).exists() and not all(entry.name.startswith(WRITING) for entry in others):
        raise UserError(f"{out}: the folder is not empty and holds no prepared data; choose another")
    claim(out / FINGERPRINT, fingerprint, advice="choose another folder")


@dataclass
class _Writer:
    """One walk through the source: writes the shards that are neither complete nor another process's.

    states: of the complete shards so far, in order.
    """

    encoder: Encoder
    out: Path
    selection: Selection
    states: list[dict[str, Any]] = field(default_factory=list)
    bar: Any = None

    def walk(self, stream: Iterator[Group | Skipped]) -> list[FileLock]:
        """Write what is left to write; returns the locks of the shards that other processes are writing."""
        busy: list[FileLock] = []
        (self.out / LOCKS).mkdir(exist_ok=True)
        number, last = 0, False
        while not last:
            lock = FileLock(self.out / LOCKS / f"{number}.lock")
            try:
                acquired = lock.acquire(blocking=False)
            except Timeout:
                busy.append(lock)
                last = self._pass_over(stream)
            else:
                with acquired:
                    complete = (self.out / shard_name(number)).is_dir()
                    last = (self._resume if complete else self._write)(stream, number)
            number += 1
        return busy

    def _resume(self, stream: Iterator[Group | Skipped], number: int) -> bool:
        shard = self.out / shard_name(number)
        state = read_json(shard / STATE)
        if sum(1 for _ in islice(stream, state["rows"])) < state["rows"]:
            raise UserError(f"{self.out}: the source has become shorter than what was prepared; delete the folder")
        if self.encoder.text_columns:
            self.encoder.know_texts(read_table(shard / TEXTS)["text"].to_pylist())
        self.states.append(state)
        self._show(state["rows"])
        return bool(state["last"])

    def _pass_over(self, stream: Iterator[Group | Skipped]) -> bool:
        """Go through the rows of a shard that another process is writing, which stores their texts."""
        covered = 0
        for item in islice(stream, self.encoder.rows_per_shard):
            covered += 1
            self.encoder.know_texts(item.texts if isinstance(item, Group) else ())
        self._show(covered)
        return covered < self.encoder.rows_per_shard

    def _write(self, stream: Iterator[Group | Skipped], number: int) -> bool:
        """Encode and store the next rows of the stream, one shard of them; the last may be empty."""
        rows: list[Row] = []
        skipped: list[Skipped] = []
        counts: Counter[str] = Counter()
        covered, usable, last = 0, self._sum("usable"), False
        while covered < self.encoder.rows_per_shard and not last:
            at_most = min(self.encoder.rows_at_once, self.encoder.rows_per_shard - covered)
            items = list(self.selection.first(islice(stream, at_most), usable))
            groups = [item for item in items if isinstance(item, Group)]
            encoded = iter(self.encoder.encode(groups) if groups else [])
            for item in items:
                row = item.reason if isinstance(item, Skipped) else next(encoded)
                if isinstance(item, Skipped) or isinstance(row, str):
                    skipped.append(Skipped(id=item.id, origin=item.origin, reason=str(row)))
                    continue
                rows.append({**{name: getattr(item, name) for name in column_types()}, **row})
                counts.update([f"k={len(item.candidates)}", *["ties"] * item.is_tie, *item.present])
                usable += self.selection.accepts(item)
            covered += len(items)
            last = not items or usable == self.selection.limit
            self._show(len(items), len(rows), len(skipped))
        state = {"rows": covered, "last": last, "groups": len(rows), "skipped": len(skipped),
                 "usable": usable - self._sum("usable"), "counts": dict(sorted(counts.items()))}  # fmt: skip
        self._store(number, rows, skipped, state)
        self.states.append(state)
        return last

    def _store(self, number: int, rows: list[Row], skipped: list[Skipped], state: dict[str, Any]) -> None:
        texts = self.encoder.take_texts()
        with atomic_folder(self.out / shard_name(number)) as folder:
            write_table(folder / GROUPS, rows, {**column_types(), **self.encoder.columns})
            if self.encoder.text_columns:
                write_table(folder / TEXTS, texts, {"text": pa.string(), **self.encoder.text_columns})
            state["texts"] = len(texts)
            state["files"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            # In ASCII: an id or a file's name may hold what is not valid Unicode, and that is why its row was skipped.
            (folder / SKIPPED).write_text("".join(json.dumps(asdict(row)) + "\n" for row in skipped))
            (folder / STATE).write_text(json.dumps(state, indent=1))

    def _sum(self, name: str) -> int:
        return sum(state[name] for state in self.states)

    def _show(self, rows: int, groups: int = 0, skipped: int = 0) -> None:
        self.bar.update(rows)
        self.bar.set_postfix(groups=self._sum("groups") + groups, skipped=self._sum("skipped") + skipped)


def _finish(out: Path, fingerprint: Mapping[str, Any], encoder: Encoder) -> None:
    states: list[dict[str, Any]] = []
    while not (states and states[-1]["last"]):
        shard = out / shard_name(len(states))
        if not shard.is_dir():
            raise UserError(f"{out}: another process was stopped while it wrote {shard.name}; run again to continue")
        states.append(read_json(shard / STATE))
    folders = [out / shard_name(number) for number in range(len(states))]
    skipped = "".join((folder / SKIPPED).read_text() for folder in folders)
    if not any(state["groups"] for state in states):
        shutil.rmtree(out)
        reasons = [json.loads(line) for line in skipped.splitlines()]
        shown = "; ".join(f"{row['origin']}: {row['reason']}" for row in reasons[:REASONS_SHOWN])
        raise UserError(f"no usable group among {len(reasons)} rows. The first reasons: {shown}")
    with atomic_file(out / SKIPPED) as file:
        file.write_text(skipped)
    buckets = _write_index(out, folders)
    counts = sum((Counter(state["counts"]) for state in states), Counter[str]())
    manifest = {
        "layout": LAYOUT,
        "fingerprint": dict(fingerprint),
        "counts": {
            **{name: sum(state[name] for state in states) for name in ("groups", "skipped", "texts")},
            "ties": counts["ties"],
            "candidates": {name[2:]: count for name, count in sorted(counts.items()) if name.startswith("k=")},
            "columns": {name: counts[name] for name in ("scores", *COLUMNS)},
        },
        **encoder.description,
        "buckets": buckets,
        "shards": [{name: state[name] for name in ("groups", "texts", "files")} for state in states],
    }
    write_json(out / MANIFEST, manifest)
    for left_over in (out / LOCKS, *out.glob(f"{WRITING}shard-*")):
        shutil.rmtree(left_over, ignore_errors=True)


def _write_index(out: Path, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Write a small row per group, its texts as numbers over all shards, -1 for none; returns the buckets.

    A bucket is a size in pixels and the shape that latents have there. They are in the order of their aspect ratios.
    """
    numbers: dict[str, int] = {}

    def number(text: str | None) -> int:
        # A text's first shard stores it; where it cannot, the process of that shard skips the groups that it has.
        if text is not None and numbers and text not in numbers:
            raise UserError(
                f"{out}: the embedding of {text!r} is not finite in half precision, and its groups were spread over "
                "several processes. Delete the folder and prepare it with one, which skips them."
            )
        return -1 if text is None else numbers.get(text, -1)

    stored = 0
    lists = {"prompt": False, **{name: column.per_candidate for name, column in COLUMNS.items() if column.text}}
    index: dict[str, list[Any]] = {name: [] for name in (*INDEX_TYPES, *lists)}
    for folder in folders:
        groups = read_table(folder / GROUPS)
        if (folder / TEXTS).exists():
            for text in read_table(folder / TEXTS)["text"].to_pylist():
                numbers.setdefault(text, stored)
                stored += 1
        scores = groups["scores"].to_pylist()
        index["k"] += map(len, scores)
        index["best"] += map(max, scores)
        index["worst"] += map(min, scores)
        for name, is_list in lists.items():
            values = groups[name].to_pylist()
            if is_list:
                index[name] += [[number(text) for text in texts or ()] for texts in values]
            else:
                index[name] += map(number, values)
        if "shape" in groups.schema.names:
            columns = groups["size"].to_pylist(), groups["shape"].to_pylist()
            index["bucket"] += [(tuple(size), tuple(shape)) for size, shape in zip(*columns, strict=True)]
    buckets = sorted(set(index["bucket"]), key=lambda bucket: bucket[0][0] / bucket[0][1])
    index["bucket"] = [buckets.index(bucket) for bucket in index["bucket"]] or [0] * len(index["k"])
    with atomic_file(out / INDEX) as file:
        texts = {name: pa.list_(pa.int64()) if is_list else pa.int64() for name, is_list in lists.items()}
        write_table(file, index, {**INDEX_TYPES, **texts})
    return [{"size": size, "shape": shape} for size, shape in buckets]


def write_table(file: Path, values: Sequence[Row] | Mapping[str, Any], types: Mapping[str, pa.DataType]) -> None:
    """Write rows, or columns by name, as an Arrow file of one record batch, so that mapped columns are contiguous."""
    make = pa.Table.from_pydict if isinstance(values, Mapping) else pa.Table.from_pylist
    table = make(values, pa.schema(types)).combine_chunks()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch((table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)])[0])
