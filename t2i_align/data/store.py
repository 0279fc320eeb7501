"""Prepared data: groups encoded into Arrow shards by any number of processes, and opened at once whatever their size.

    <folder>/fingerprint.json        what this folder is made from; another fingerprint is refused
             shard-00000/            complete once it has this name
                 groups.arrow        id, prompt, scores, the optional columns, and what the encoder adds
                 texts.arrow         the texts that occur in no earlier shard, encoded; the first is the empty one
                 skipped.jsonl       rows that could not be used, with the reason
                 state.json          source rows covered, counts
             index.arrow             a small row per group, to choose and shuffle without opening shards
             skipped.jsonl           all of them
             manifest.json           written last: with it, the folder is finished

A shard covers a fixed number of source rows, so that a run that was killed at any instant continues with the same
result, and several processes, on one machine or on many that share the folder, each write the next shard that no other
is writing. Groups of several sizes lie in one store: each belongs to a bucket, which is a size in pixels with a shape
of latents.
"""

from __future__ import annotations

import errno
import json
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout

from t2i_align.data.encode import Encoder, Row, Texts
from t2i_align.data.schema import COLUMNS, EVERYTHING, PLAIN_SCORES, Group, Selection, Skipped
from t2i_align.errors import UserError
from t2i_align.utils.arrow import intact, read_table, sha256, write_table
from t2i_align.utils.files import LOCK, WRITING, atomic_file, atomic_folder, claim, locked, write_json, write_text
from t2i_align.utils.progress import progress_bar

LAYOUT = 4  # raise when a folder written before can no longer be read
MANIFEST, FINGERPRINT, INDEX, SKIPPED = "manifest.json", "fingerprint.json", "index.arrow", "skipped.jsonl"
GROUPS, TEXTS, STATE = "groups.arrow", "texts.arrow", "state.json"
REASONS_SHOWN = 3  # rows that cannot be used, in a message
INDEX_TYPES = {"k": pa.int32(), "best": pa.float64(), "worst": pa.float64(), "bucket": pa.int32()}


def column_types() -> dict[str, pa.DataType]:
    """What all groups have, by name, and the optional columns."""
    types: dict[str, Any] = {"id": pa.string(), "prompt": pa.string(), "scores": pa.list_(pa.float64())}
    for name, column in COLUMNS.items():
        types[name] = pa.type_for_alias(column.type)
        for _ in range(column.per_candidate + column.per_segment):
            types[name] = pa.list_(types[name])
    return types


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
        items: best first, ids unique, in the same order in each call; total: their number.
        fingerprint: named JSON values that decide what the folder holds.
        selection: its limit ends the reading after so many groups that it accepts.

    Raises:
        UserError: another fingerprint, the disk is full, nothing usable, a source that has become shorter.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be used as the folder for prepared data: {error}") from error
    lock = FileLock(out / LOCK)
    with progress_bar(total=total, desc="encode", unit="row", disable=not progress) as bar, _full_disk_reported(out):
        with locked(lock):
            claim(out / FINGERPRINT, fingerprint, content="prepared data", advice="choose another folder")
        # A limit counts groups from the first row on: then one process writes, and the others wait.
        with locked(lock) if selection.limit is not None else nullcontext():
            if is_complete(out):
                return
            (out / MANIFEST).unlink(missing_ok=True)  # a shard was lost
            for busy in _Writer(encoder, Texts(encoder), out, selection, bar).walk(iter(items)):
                with locked(busy):  # held while its shard is being written
                    pass
            with locked(lock):
                if not is_complete(out):
                    _finish(out, fingerprint, encoder)
                for left_over in out.glob(f"{WRITING}shard-*"):
                    shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()


@contextmanager
def _full_disk_reported(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{out}: the disk is full. What is complete stays; run again to continue.") from error


@dataclass
class _Writer:
    """One walk through the source: writes the shards that are neither complete nor another process's.

    counts: groups, skipped and usable (accepted by the selection) of this process's and complete shards so far.
    """

    encoder: Encoder
    texts: Texts
    out: Path
    selection: Selection
    bar: Any
    counts: Counter[str] = field(default_factory=Counter)

    def walk(self, stream: Iterator[Group | Skipped]) -> list[FileLock]:
        """Write what is left to write; returns the locks of the shards that other processes are writing."""
        busy: list[FileLock] = []
        number, last = 0, False
        while not last:
            lock = FileLock(self.out / f"{WRITING}{shard_name(number)}.lock", blocking=False)
            try:
                with locked(lock):
                    complete = (self.out / shard_name(number)).is_dir()
                    last = (self._resume if complete else self._write)(stream, number)
            except Timeout:
                busy.append(FileLock(lock.lock_file))
                last = self._pass_over(stream)
            number += 1
        return busy

    def _resume(self, stream: Iterator[Group | Skipped], number: int) -> bool:
        state = _state(shard := self.out / shard_name(number))
        if sum(1 for _ in islice(stream, state["rows"])) < state["rows"]:
            raise UserError(f"{self.out}: the source has become shorter than what was prepared; delete the folder")
        self.texts.known.update(read_table(shard / TEXTS)["text"].to_pylist())
        self._count(state["rows"], **{name: state[name] for name in ("groups", "skipped", "usable")})
        return bool(state["last"])

    def _pass_over(self, stream: Iterator[Group | Skipped]) -> bool:
        """Go through the rows of a shard that another process is writing, which stores their texts."""
        items = list(islice(stream, self.encoder.rows_per_shard))
        self.texts.known.update(text for item in items if isinstance(item, Group) for text in item.texts)
        self._count(len(items))
        return len(items) < self.encoder.rows_per_shard

    def _write(self, stream: Iterator[Group | Skipped], number: int) -> bool:
        """Encode and store the next rows of the stream, one shard of them; the last may be empty."""
        types, rows, skipped = column_types(), list[Row](), list[Row]()
        texts = self.texts.encode_new([""]) if number == 0 else []
        covered, usable_before, last = 0, self.counts["usable"], False
        while covered < self.encoder.rows_per_shard and not last:
            at_most = min(self.encoder.rows_at_once, self.encoder.rows_per_shard - covered)
            items = list(self.selection.first(islice(stream, at_most), self.counts["usable"]))
            groups = [item for item in items if isinstance(item, Group)]
            texts += self.texts.encode_new([text for group in groups for text in group.texts])
            encoded = iter(self.encoder.encode(groups))
            for item in items:
                row = item.reason if isinstance(item, Skipped) else self.texts.checked(item, next(encoded))
                if isinstance(item, Skipped) or isinstance(row, str):
                    skipped.append({"id": item.id, "origin": item.origin, "reason": row})
                    self._count(1, skipped=1)
                else:
                    rows.append({**{name: getattr(item, name) for name in types}, **row})
                    self._count(1, groups=1, usable=self.selection.accepts(item))
            covered += len(items)
            last = not items or self.counts["usable"] == self.selection.limit
        state: Row = {"rows": covered, "last": last, "groups": len(rows), "skipped": len(skipped), "texts": len(texts),
                 "usable": self.counts["usable"] - usable_before}  # fmt: skip
        with atomic_folder(self.out / shard_name(number)) as folder:
            write_table(folder / GROUPS, pa.Table.from_pylist(rows, pa.schema(types | self.encoder.columns)))
            write_table(folder / TEXTS, pa.Table.from_pylist(texts, pa.schema(self.encoder.text_columns)))
            state["sha256"] = {file.name: sha256(file) for file in sorted(folder.iterdir())}
            # In ASCII: an id or a file's name may hold what is not valid Unicode, and that is why its row was skipped.
            (folder / SKIPPED).write_text("".join(json.dumps(row) + "\n" for row in skipped))
            (folder / STATE).write_text(json.dumps(state, indent=1))
        return last

    def _count(self, rows: int, **counts: int) -> None:
        self.counts.update(counts)
        self.bar.set_postfix(groups=self.counts["groups"], skipped=self.counts["skipped"], refresh=False)
        self.bar.update(rows)


def _finish(out: Path, fingerprint: Mapping[str, Any], encoder: Encoder) -> None:
    states: list[dict[str, Any]] = []
    while not (states and states[-1]["last"]):
        shard = out / shard_name(len(states))
        if not shard.is_dir():
            raise UserError(f"{out}: another process was stopped while it wrote {shard.name}; run again to continue")
        states.append(_state(shard) | {"files": {file.name: file.stat().st_size for file in sorted(shard.iterdir())}})
    folders = [out / shard_name(number) for number in range(len(states))]
    skipped = "".join((folder / SKIPPED).read_text(errors="replace") for folder in folders)
    sums = {name: sum(state[name] for state in states) for name in ("groups", "skipped", "texts")}
    if not sums["groups"]:
        shutil.rmtree(out)
        first = map(json.loads, skipped.splitlines()[:REASONS_SHOWN])
        shown = "; ".join(f"{row['origin']}: {row['reason']}" for row in first)
        raise UserError(f"no usable group among {sums['skipped']} rows. The first reasons: {shown}")
    write_text(out / SKIPPED, skipped)
    buckets, counts = _write_index(out, folders, encoder)
    manifest = {
        "layout": LAYOUT,
        "fingerprint": dict(fingerprint),
        "counts": {**sums, **counts},
        **encoder.description,
        "buckets": buckets,
        "sha256": sha256(out / INDEX),
        "files": {name: (out / name).stat().st_size for name in (FINGERPRINT, SKIPPED)},
        "shards": [{name: state[name] for name in ("groups", "texts", "files", "sha256")} for state in states],
    }
    write_json(out / MANIFEST, manifest)


def _write_index(out: Path, folders: Sequence[Path], encoder: Encoder) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write a small row per group, its texts as numbers over all shards, -1 for none; returns the buckets and counts.

    Texts that the encoder cannot tell apart have one number. Buckets are in the order of their aspect ratios. Counts
    are of ties, of groups by their number of candidates, and of groups with each column (see `Group.present`).
    """
    groups = pa.Table.from_batches([read_table(folder / GROUPS) for folder in folders])
    texts = [text for folder in folders for text in read_table(folder / TEXTS)["text"].to_pylist()]
    keys = encoder.text_keys(texts)
    first = {key: place for place, key in reversed([*enumerate(keys)])}
    places = {text: first[key] for text, key in zip(texts, keys, strict=True)}

    def number(text: str | None) -> int:
        # A text's first shard stores it; where it cannot, the process of that shard skips the groups that it has.
        if text is not None and text not in places:
            raise UserError(
                f"{out}: the embedding of {text!r} is not finite in half precision, and its groups were spread over "
                "several processes. Delete the folder and prepare it with one, which skips them."
            )
        return -1 if text is None else places[text]

    scores = np.from_dlpack(pc.list_flatten(groups["scores"]).combine_chunks())
    k = np.from_dlpack(pc.list_value_length(groups["scores"]).combine_chunks())
    ends = np.cumsum(k)
    index: dict[str, Any] = {"k": k, "best": scores[ends - k], "worst": scores[ends - 1]}
    types = dict(INDEX_TYPES)
    for name in ("prompt", *(name for name, column in COLUMNS.items() if column.text)):
        values, is_list = groups[name].to_pylist(), pa.types.is_list(groups[name].type)
        types[name] = pa.list_(pa.int64()) if is_list else pa.int64()
        index[name] = [list(map(number, of or ())) for of in values] if is_list else list(map(number, values))
    encoded = "shape" in groups.schema.names
    pixels = groups.select(["size", "shape"]).to_pylist() if encoded else [{"size": [1, 1]}] * len(k)
    buckets = sorted(({str(one): one for one in pixels}).values(), key=lambda one: one["size"][0] / one["size"][1])
    index["bucket"] = [buckets.index(one) for one in pixels]
    with atomic_file(out / INDEX) as file:
        write_table(file, pa.Table.from_pydict(index, pa.schema(types)))
    graded = np.logical_or.reduceat(~np.isin(scores, PLAIN_SCORES), ends - k)
    counts = {
        "ties": int(((k > 1) & (index["best"] == index["worst"])).sum()),
        "candidates": {str(one): int(count) for one, count in zip(*np.unique(k, return_counts=True), strict=True)},
        "columns": {"scores": int(graded.sum())} | {name: len(k) - groups[name].null_count for name in COLUMNS},
    }
    return buckets if encoded else [], counts


def is_store(path: Path) -> bool:
    """Whether a folder holds prepared data, finished or not."""
    return (path / MANIFEST).is_file() or (path / FINGERPRINT).is_file()


def is_complete(path: Path) -> bool:
    """Whether prepared data is finished and none of its shards is lost."""
    file = path / MANIFEST
    with intact(file):
        shards = json.loads(file.read_bytes())["shards"] if file.is_file() else None
    return shards is not None and all((path / shard_name(number)).is_dir() for number in range(len(shards)))


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _state(shard: Path) -> dict[str, Any]:
    with intact(file := shard / STATE):
        state = {"sha256": {}, **json.loads(file.read_bytes())}
        return {n: state[n] for n in ("rows", "last", "groups", "skipped", "texts", "usable", "sha256")}


class Store:
    """A finished folder: its manifest, a small index of all groups, and the tables of shards on demand, memory-mapped.

    k, best, worst, bucket: of each group the number of candidates, the scores of the first and the last of these, and
    the number of its bucket. tie: whether the two scores are equal.

    Raises:
        UserError: no prepared data there, unfinished, from another version, or a shard missing or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with intact(path / MANIFEST):
            self.manifest = _read_manifest(path)
            self._shards = self.manifest["shards"]
            counts = {name: [shard[name] for shard in self._shards] for name in ("groups", "texts")}
        index = read_table(path / INDEX, self.manifest.get("sha256"))
        self.index = dict(zip(index.schema.names, index.columns, strict=True))
        self.k, self.best, self.worst, self.bucket = (np.from_dlpack(self.index[name]) for name in INDEX_TYPES)
        self.tie: np.ndarray = (self.k > 1) & (self.best == self.worst)
        self._starts = {GROUPS: [0, *accumulate(counts["groups"])], TEXTS: [0, *accumulate(counts["texts"])]}
        self._columns: dict[tuple[str, int], dict[str, pa.Array]] = {}

    def __len__(self) -> int:
        return len(self.k)

    def __reduce__(self) -> Any:
        return Store, (self.path,)  # a worker process maps the files itself

    def locate(self, number: int, file: str = GROUPS) -> tuple[dict[str, pa.Array], int]:
        """The columns of the shard that has a group, and its row there; with TEXTS, a text's, of which 0 is empty."""
        shard = bisect_right(self._starts[file], number) - 1
        if (file, shard) not in self._columns:
            table = read_table(self.path / shard_name(shard) / file, self._shards[shard].get("sha256", {}).get(file))
            self._columns[file, shard] = dict(zip(table.schema.names, table.columns, strict=True))
        return self._columns[file, shard], number - self._starts[file][shard]


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        if is_store(path):
            raise UserError(f"{path}: this prepared data is unfinished; run the same prepare again to continue it")
        raise UserError(f"{path}: no prepared data in this folder ({MANIFEST} is missing)")
    manifest: dict[str, Any] = json.loads(file.read_bytes())
    if (layout := manifest.get("layout")) != LAYOUT:
        raise UserError(f"{path}: prepared with layout {layout!r}, this version reads {LAYOUT}; prepare it again")
    parts = {path: manifest} | {path / shard_name(number): one for number, one in enumerate(manifest["shards"])}
    for folder, part in parts.items():
        for name, size in part.get("files", {}).items():
            file = folder / name
            if (own := file.stat().st_size if file.is_file() else None) != size:
                state = "is missing" if own is None else f"has {own} bytes instead of {size}"
                raise UserError(f"{file}: this part of the prepared data {state}; delete the folder and prepare again")
    return manifest
