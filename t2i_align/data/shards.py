"""Writing groups as Arrow shards that survive a kill at any moment.

    <folder>/fingerprint.json        written first: what this folder is being made from
             shard-00000/            complete once it has this name; written as shard-00000.tmp
                 groups.arrow        the columns of BASE_SCHEMA and what the payload adds; one record batch
                 skipped.jsonl       rows that could not be used, with the reason
                 state.json          how many source rows the shard covers
             index.arrow             a small row per group, for selecting and shuffling without opening shards
             skipped.jsonl           all of them
             manifest.json           written last: with it, the folder is finished

A shard covers a fixed number of source rows, so an interrupted run continues with the same result, and several
processes, on one machine or on many that share the folder, each write the next shard that nobody is writing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm

from t2i_align.data.layout import (
    FINGERPRINT,
    GROUPS,
    INDEX,
    LAYOUT,
    MANIFEST,
    PROMPTS,
    SKIPPED,
    STATE,
    Parts,
    differences,
    read_table,
    shard_name,
    write_json,
    write_table,
)
from t2i_align.data.readers import Limit
from t2i_align.data.schema import COLUMNS, Column, Group, Skipped
from t2i_align.data.survey import REASONS_SHOWN
from t2i_align.errors import UserError

LOCKS = ".locks"


def arrow_type(column: Column) -> pa.DataType:
    """The type of a group's value in an optional column."""
    one = pa.type_for_alias(column.type)
    return pa.list_(one) if column.per_candidate else one


BASE_SCHEMA = (
    ("id", pa.string()),
    ("prompt", pa.string()),
    ("scores", pa.list_(pa.float64())),
    *(
        (name, pa.list_(pa.type_for_alias(column.type)) if column.per_candidate else pa.type_for_alias(column.type))
        for name, column in COLUMNS.items()
    ),
)
INDEX_SCHEMA = (
    ("k", pa.int32()),
    ("best", pa.float64()),
    ("worst", pa.float64()),
    ("prompt", pa.int64()),
    ("captions", pa.list_(pa.int64())),
    ("negative_caption", pa.int64()),
)

Row = dict[str, Any]


class Payload(Protocol):
    """What is stored of a group's candidates, beside the columns that all groups have."""

    @property
    def columns(self) -> Sequence[tuple[str, pa.DataType]]:
        """Names and types of what `encode` adds to a row."""

    def encode(self, groups: Sequence[Group]) -> list[Row | Skipped]:
        """A row of `columns`, or a reason, for each group."""

    def tables(self) -> dict[str, pa.Table]:
        """Further tables of the shard that ends now, by file name (`prompts.arrow` has a `prompt` column)."""

    def resume(self, shard: Path) -> None:
        """Take note of a complete shard of an interrupted run."""

    def pass_over(self, groups: Sequence[Group]) -> None:
        """Take note of groups whose shard another process is writing."""

    def describe(self) -> dict[str, Any]:
        """What the manifest should say of the payload."""


def write(
    items: Iterable[Group | Skipped],
    payload: Payload,
    out: Path,
    *,
    fingerprint: Parts,
    rows_per_shard: int,
    rows_at_once: int,
    total: int | None = None,
    limit: Limit | None = None,
    progress: bool = True,
    what: str = "prepare",
    may_be_empty: bool = False,
) -> None:
    """Write all groups below `out`, or continue where an earlier call was killed; returns at once if it is finished.

    Args:
        items: best first, ids unique, in an order that is the same in each call.
        fingerprint: named parts, JSON values; a folder with another fingerprint is refused.
        rows_per_shard, rows_at_once: source rows a shard, and of these, how many the payload encodes together.
        total: how many items there are, for the progress bar.
        may_be_empty: whether it is no error that nothing is usable.

    Raises:
        UserError: another fingerprint, the disk is full, nothing usable.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be used as the folder for prepared data: {error}") from error
    with FileLock(out / ".lock"):
        _claim(out, fingerprint)
    # Where a limit decides how far to go, what is before a shard has to be known: one process writes, others wait.
    with FileLock(out / ".lock") if limit is not None else nullcontext():
        if (out / MANIFEST).exists():
            return
        writer = _Writer(payload, out, limit, rows_per_shard, rows_at_once)
        with tqdm(total=total, desc=what, unit="row", disable=not progress) as writer.bar:
            try:
                for lock in writer.walk(iter(items)):
                    with lock:  # held while its shard is being written
                        pass
            except FileNotFoundError:  # the locks are gone: others have finished it all in the meantime
                if not (out / MANIFEST).exists():
                    raise
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(f"{out}: the disk is full. What is complete stays; run again to continue.") from error
        with FileLock(out / ".lock") if limit is None else nullcontext():
            if not (out / MANIFEST).exists():
                _finish(out, fingerprint, payload, _states(out), may_be_empty)


def _claim(out: Path, fingerprint: Parts) -> None:
    file = out / FINGERPRINT
    wanted = json.loads(json.dumps(dict(fingerprint)))
    if file.exists():
        found = differences(json.loads(file.read_text()), wanted, "this folder has", "this run wants")
        if found:
            raise UserError(f"{out}: this folder was prepared from something else. {found}. Choose another folder.")
    elif any(
        entry.name not in (".lock", LOCKS) and entry.suffix != ".tmp" for entry in out.iterdir()
    ):  # .tmp: killed here before
        raise UserError(f"{out}: the folder is not empty and holds no prepared data; choose another")
    else:
        write_json(file, wanted)


def _states(out: Path) -> list[dict[str, Any]]:
    """What all shards say of themselves."""
    states: list[dict[str, Any]] = []
    while not (states and states[-1]["last"]):
        shard = out / shard_name(len(states))
        if not shard.is_dir():
            raise UserError(f"{out}: another process was stopped while it wrote {shard.name}; run again to continue")
        states.append(json.loads((shard / STATE).read_text()))
    return states


@dataclass
class _Writer:
    """One walk through the source: which shards are written here, and the state of each that is complete."""

    payload: Payload
    out: Path
    limit: Limit | None
    rows_per_shard: int
    rows_at_once: int
    states: list[dict[str, Any]] = field(default_factory=list)
    bar: Any = None

    def sum(self, name: str) -> int:
        return sum(state[name] for state in self.states)

    def walk(self, stream: Iterator[Group | Skipped]) -> list[FileLock]:
        """Write each shard that is neither complete nor being written; returns the locks of those that others write."""
        busy: list[FileLock] = []
        (self.out / LOCKS).mkdir(exist_ok=True)
        number, last = 0, False
        while not last:
            lock = FileLock(self.out / LOCKS / f"{number}.lock")
            try:
                held = lock.acquire(blocking=False)
            except Timeout:
                busy.append(lock)
                last = self._pass_over(stream)
            else:
                with held:
                    there = (self.out / shard_name(number)).is_dir()
                    last = (self._resume if there else self._write)(stream, number)
            number += 1
        return busy

    def _resume(self, stream: Iterator[Group | Skipped], number: int) -> bool:
        shard = self.out / shard_name(number)
        state: dict[str, Any] = json.loads((shard / STATE).read_text())
        if sum(1 for _ in islice(stream, state["rows"])) < state["rows"]:
            raise UserError(f"{self.out}: the source has become shorter than what was prepared; delete the folder")
        self.payload.resume(shard)
        self.states.append(state)
        self._show(state["rows"])
        return bool(state["last"])

    def _pass_over(self, stream: Iterator[Group | Skipped]) -> bool:
        """Go through the rows of a shard that another process is writing, which stores their texts."""
        covered = 0
        while items := list(islice(stream, min(self.rows_at_once, self.rows_per_shard - covered))):
            covered += len(items)
            self.payload.pass_over([item for item in items if isinstance(item, Group)])
            self._show(len(items))
        return covered < self.rows_per_shard

    def _write(self, stream: Iterator[Group | Skipped], number: int) -> bool:
        """Encode and store the next rows of the stream, one shard of them; the last may be empty."""
        rows: list[Row] = []
        skipped: list[Skipped] = []
        counts: Counter[str] = Counter()
        covered = usable = 0
        last = False
        while covered < self.rows_per_shard and not last:
            items = list(islice(stream, min(self.rows_at_once, self.rows_per_shard - covered)))
            last = not items
            for item, row in zip(items, _encoded(items, self.payload), strict=True):
                covered += 1
                if isinstance(row, Skipped):
                    skipped.append(row)
                    continue
                assert isinstance(item, Group)
                rows.append(row)
                counts.update(_counted(item))
                usable += self.limit is None or self.limit.counts(item)
                if self.limit is not None and self.sum("usable") + usable >= self.limit.groups:
                    last = True
                    break
            self._show(len(items), len(rows), len(skipped))
        state = {
            "rows": covered,
            "last": last,
            "groups": len(rows),
            "skipped": len(skipped),
            "usable": usable,
            "counts": dict(sorted(counts.items())),
        }
        _store(self.out / shard_name(number), rows, skipped, self.payload, state)
        self.states.append(state)
        return last

    def _show(self, rows: int, groups: int = 0, skipped: int = 0) -> None:
        self.bar.update(rows)
        self.bar.set_postfix(groups=self.sum("groups") + groups, skipped=self.sum("skipped") + skipped)


def _encoded(items: list[Group | Skipped], payload: Payload) -> list[Row | Skipped]:
    groups = [item for item in items if isinstance(item, Group)]
    encoded = iter(payload.encode(groups) if groups else [])
    return [item if isinstance(item, Skipped) else _row(item, next(encoded)) for item in items]


def _row(group: Group, encoded: Row | Skipped) -> Row | Skipped:
    if isinstance(encoded, Skipped):
        return encoded
    return {**{name: getattr(group, name) for name, _ in BASE_SCHEMA}, **encoded}


def _counted(group: Group) -> list[str]:
    counted = [f"k={len(group.candidates)}", *group.present]
    return [*counted, "ties"] if group.is_tie else counted


def _store(shard: Path, rows: list[Row], skipped: list[Skipped], payload: Payload, state: dict[str, Any]) -> None:
    temporary = shard.with_name(shard.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    schema = pa.schema([*BASE_SCHEMA, *payload.columns])
    tables = {GROUPS: pa.Table.from_pylist(rows, schema), **payload.tables()}
    for name, table in tables.items():
        write_table(temporary / name, table)
    state["prompts"] = tables[PROMPTS].num_rows if PROMPTS in tables else 0
    state["files"] = {name: (temporary / name).stat().st_size for name in tables}
    # In ASCII: an id or a file's name may hold what is no valid Unicode, and that is why its row was skipped.
    (temporary / SKIPPED).write_text("".join(json.dumps(asdict(row)) + "\n" for row in skipped))
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    for file in temporary.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    temporary.rename(shard)


def _finish(out: Path, fingerprint: Parts, payload: Payload, states: Sequence[Parts], may_be_empty: bool) -> None:
    skipped = [out / shard_name(number) / SKIPPED for number in range(len(states))]
    if not may_be_empty and not any(state["groups"] for state in states):
        lines = [line for file in skipped for line in file.read_text().splitlines()]
        reasons = [json.loads(line) for line in lines[:REASONS_SHOWN]]
        shutil.rmtree(out)
        shown = "; ".join(f"{row['origin']}: {row['reason']}" for row in reasons)
        raise UserError(f"no usable group among {len(lines)} rows. The first reasons: {shown}")
    with open(out / (SKIPPED + ".tmp"), "w") as sink:
        for file in skipped:
            sink.write(file.read_text())
    (out / (SKIPPED + ".tmp")).replace(out / SKIPPED)
    write_table(out / (INDEX + ".tmp"), _index(out, len(states)))
    (out / (INDEX + ".tmp")).replace(out / INDEX)
    counts: Counter[str] = Counter()
    for state in states:
        counts.update(state["counts"])
    candidates = {name.removeprefix("k="): count for name, count in sorted(counts.items()) if name.startswith("k=")}
    write_json(
        out / MANIFEST,
        {
            "layout": LAYOUT,
            "fingerprint": dict(fingerprint),
            "counts": {
                "groups": sum(state["groups"] for state in states),
                "skipped": sum(state["skipped"] for state in states),
                "ties": counts["ties"],
                "prompts": sum(state["prompts"] for state in states),
                "candidates": candidates,
                "columns": {name: counts[name] for name in ("scores", *COLUMNS)},
            },
            **payload.describe(),
            "shards": [{name: state[name] for name in ("groups", "prompts", "files")} for state in states],
        },
    )
    for left_over in (out / LOCKS, *out.glob("shard-*.tmp")):
        shutil.rmtree(left_over, ignore_errors=True)


def _index(out: Path, shards: int) -> pa.Table:
    """A small row per group, best and worst being scores; texts are numbered over all shards, -1 for none."""
    known: dict[str | None, int] = {}
    stored = 0
    rows: dict[str, list[Any]] = {name: [] for name, _ in INDEX_SCHEMA}
    for number in range(shards):
        shard = out / shard_name(number)
        if (shard / PROMPTS).exists():
            for prompt in read_table(shard / PROMPTS).column("prompt").to_pylist():
                known.setdefault(prompt, stored)
                stored += 1
        groups = read_table(shard / GROUPS)
        if stored:
            _check_texts(out, groups, known)
        scores = groups["scores"].to_pylist()
        rows["k"] += map(len, scores)
        rows["best"] += map(max, scores)
        rows["worst"] += map(min, scores)
        for name in ("prompt", "negative_caption"):
            rows[name] += [known.get(text, -1) for text in groups[name].to_pylist()]
        rows["captions"] += [[known.get(text, -1) for text in texts or ()] for texts in groups["captions"].to_pylist()]
    return pa.table(rows, pa.schema(INDEX_SCHEMA))


def _check_texts(out: Path, groups: pa.RecordBatch, known: Mapping[str | None, int]) -> None:
    """A text's first shard stores it, and its groups are skipped where it cannot be: those of that shard's process."""
    texts = [*groups["prompt"].to_pylist(), *groups["negative_caption"].to_pylist()]
    texts += [text for captions in groups["captions"].to_pylist() for text in captions or ()]
    for text in texts:
        if text is not None and text not in known:
            raise UserError(
                f"{out}: the embedding of {text!r} is not finite in half precision, and its groups were spread over "
                "several processes. Delete the folder and prepare it with one, which skips them."
            )
