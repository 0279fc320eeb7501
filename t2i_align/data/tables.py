"""From tables of any kind to groups: a file's rows, and by column maps the groups that they hold.

    Columns(candidates=["left", "right"], votes=["votes_left", "votes_right"], prompt="text")
    Columns(candidates="image_path", ranks="rank", group="prompt_id")

What makes a row unusable becomes a recorded skip here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from t2i_align.data import shards, sheets, webdataset
from t2i_align.data.paths import existing
from t2i_align.data.schema import COLUMNS, ID, LEFT_OUT, Columns, Group, Items, Media, Names, Row, Skipped, finite
from t2i_align.data.votes import majority, won
from t2i_align.errors import UserError, shown
from t2i_align.utils.parsing import check_distinct, check_not_empty

WITH_HEADER = (*sheets.CSV, *sheets.EXCEL, ".parquet")
SUFFIXES = (*sheets.JSON, *sheets.CSV, *sheets.EXCEL, *shards.SHARDED)
ROWS_AT_ONCE = 32  # images of so many rows are held in memory
PROMPT_KEYS = ("prompt", "caption", "text")  # what prompts are called, in this order
DAMAGED = (pa.ArrowException, OSError, ValueError)  # ValueError: what Python has no value for
SHARES_TOLERANCE = 1e-3


def kind(file: Path) -> str:
    """A file's ending in small letters, which says what it is."""
    return file.suffix.lower()


def files(path: Path, split: str = shards.TRAIN) -> list[Path]:
    """The files that make up a table: itself, or those of a folder. Raises UserError as `shards.files` does."""
    return [path] if path.is_file() else shards.files(path, split)


def header(file: Path) -> list[str]:
    """The names of a file's columns; of lines and samples, those of the first."""
    if not file.is_file() or kind(file) not in SUFFIXES:
        return []
    return list(_header(file, file.stat().st_mtime_ns))


@lru_cache(maxsize=64)  # several layouts ask, and a .json list has to be read whole
def _header(file: Path, changed: int) -> tuple[str, ...]:
    if kind(file) in WITH_HEADER:
        return tuple(open_parquet(file).schema_arrow.names if kind(file) == ".parquet" else sheets.header(file))
    first = next((row for row in _rows(file, file.name, None, images=False) if isinstance(row, Row)), None)
    return tuple(first.values) if first else ()


def rows(
    path: Path,
    names: Sequence[str] | None = None,
    *,
    images: bool = True,
    part: Path | None = None,
    split: str = shards.TRAIN,
) -> Iterator[Row | Skipped]:
    """The rows of a table, streamed, with the columns `names` (default: all) of those that there are.

    Ids are `<file>:<row>`: the line of JSON Lines, else the number from 0, or the key of a sample. Without `images`,
    those that lie in the table itself are LEFT_OUT. With `part`, only the rows of this one of its files; otherwise
    the splits and shards of a folder that are left out come first.

    Raises:
        UserError: no file of a known kind, or one that is broken as a whole.
    """
    parts = [part] if part else files(path, split)
    if not parts:
        raise UserError(f"{path}: no table in this folder (files ending in {' or '.join(shards.SHARDED)})")
    root = path if path.is_dir() else path.parent
    yield from () if part or path.is_file() else shards.left_out(path, split)
    for file in parts:
        yield from _rows(file, file.relative_to(root).as_posix(), names, images)


def _rows(file: Path, name: str, names: Sequence[str] | None, images: bool) -> Iterator[Row | Skipped]:
    if not file.is_file():
        raise UserError(f"{file}: not a regular file that can be read")
    if kind(file) == ".tar":
        yield from webdataset.samples(file, name, images)
    elif kind(file) == ".parquet":
        yield from _parquet_rows(file, name, names, images)
    elif kind(file) in SUFFIXES:
        yield from sheets.rows(file, name)
    else:
        raise UserError(f"{file}: not a table; known endings: {', '.join(SUFFIXES)}")


def open_parquet(file: Path) -> pq.ParquetFile:
    """The file, memory-mapped. Raises UserError where it is empty or no parquet."""
    check_not_empty(file)
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
    except DAMAGED as error:
        raise UserError(f"{file}: not a readable parquet file (damaged or cut short?): {error}") from error
    check_distinct(file, parquet.schema_arrow.names)
    return parquet


def parquet_column(file: Path, name: str) -> pa.ChunkedArray:
    """A column alone. Raises UserError where it is damaged."""
    try:
        return open_parquet(file).read(columns=[name]).column(0)
    except DAMAGED as error:
        raise UserError(f"{file}: column {name!r} cannot be read (damaged?): {error}") from error


def _parquet_rows(file: Path, name: str, names: Sequence[str] | None, images: bool) -> Iterator[Row]:
    parquet = open_parquet(file)
    schema = parquet.schema_arrow
    wanted = [column for column in schema.names if names is None or column in names]
    left_out = {column: LEFT_OUT for column in wanted if not images and _holds_bytes(schema.field(column).type)}
    batches = parquet.iter_batches(ROWS_AT_ONCE, columns=[column for column in wanted if column not in left_out])
    done = 0
    while True:
        try:
            values = None if (batch := next(batches, None)) is None else batch.to_pylist()
        except DAMAGED as error:
            raise UserError(f"{file}: cannot be read after row {done} (damaged?): {error}") from error
        if values is None:
            return
        for number, row in enumerate(values, start=done):
            yield Row(f"{name}:{number}", f"{file}, row {number}", {**row, **left_out})
        done += len(values)


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)


def groups(
    path: Path, maps: Sequence[Columns], images: bool = True, part: Path | None = None, split: str = shards.TRAIN
) -> Items:
    """The groups of a table, or of one of its files, each row read by the first map whose columns it has.

    Raises:
        UserError: at once, where a file with a fixed schema lacks a column; while reading, a file that is broken as a
            whole, or a path that leads out of the folder.
    """
    parts = files(path, split)
    for file in [part] if part else parts:
        if kind(file) not in WITH_HEADER:
            continue
        names = header(file)
        if all(columns.missing(names) for columns in maps):
            missing = min((columns.missing(names) for columns in maps), key=len)
            raise UserError(
                f"{file}: column {missing[0]!r} is missing. Columns found: {', '.join(names) or 'none'}. A dataset "
                "spec can say which column holds what (docs/data.md)."
            )
    maps = [replace(columns, id=None) if not _has_ids(parts, columns) else columns for columns in maps]
    needed = [*dict.fromkeys(name for columns in maps for name in columns.names)]
    found = rows(path, needed, images=images, part=part, split=split)
    return _groups(found, maps, path if path.is_dir() else path.parent)


def _groups(rows: Iterator[Row | Skipped], maps: Sequence[Columns], folder: Path) -> Items:
    if maps[0].group:
        yield from _gathered(rows, maps[0], folder / maps[0].folder)
        return
    required = [(columns, {*columns.required}) for columns in maps]
    for row in rows:
        if isinstance(row, Skipped):
            yield row
        elif columns := next((columns for columns, needed in required if needed <= row.values.keys()), None):
            yield _group_of(row, [row], columns, folder / columns.folder)
        else:
            expected = ", or ".join(" and ".join(columns.required) for columns in maps[:3])  # others are synonyms
            keys = ", ".join(map(repr, row.values)) or "none"
            yield row.skipped(f"expected the keys {expected}; found {keys}")


def _gathered(rows: Iterator[Row | Skipped], columns: Columns, root: Path) -> Items:
    """Rows of one group need not follow each other, so all are held in memory, their images being paths."""
    assert columns.group is not None
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row, Skipped):
            yield row
        elif (value := row.values.get(columns.group)) in (None, ""):
            yield row.skipped(f"no {columns.group!r}")
        elif isinstance(row.values.get(str(columns.candidates)), bytes | dict):
            raise UserError(f"{row.origin}: with a group column, images must be paths, not part of the table")
        else:
            groups.setdefault(str(value), []).append(row)
    for value, members in groups.items():
        row = members[0]._replace(id=value)
        prompts = [member.values.get(str(columns.prompt)) for member in members]
        if any(prompt != prompts[0] for prompt in prompts):
            yield row.skipped(f"its {len(members)} rows have different prompts")
        else:
            yield _group_of(row, members, columns, root)


def _has_ids(files: Sequence[Path], columns: Columns) -> bool:
    """Whether a table's ids can be used as they are."""
    if not columns.id or not columns.id_if_unique:
        return True
    return _unique(columns.id, *((file, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)  # asked again for each file of a stream
def _unique(name: str, *files: tuple[Path, int]) -> bool:
    if not all(kind(file) == ".parquet" and name in header(file) for file, _ in files):
        return False
    parts = [parquet_column(file, name).cast(pa.string()) for file, _ in files]
    ids = pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
    return ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids)


def _group_of(row: Row, members: Sequence[Row], columns: Columns, root: Path) -> Group | Skipped:
    """The group of a row, or of `members` with one candidate each; what makes it unusable becomes a `Skipped` here.

    Raises:
        UserError: a path that leads out of `root`.
    """
    try:
        if columns.id and row.values.get(columns.id) is not None:
            row = row._replace(id=ID.parse(row.values[columns.id], columns.id))
        if columns.judged and row.values.get(columns.judged) in (False, 0):
            raise ValueError(f"not labelled ({columns.judged} is false)")
        values = _values(members, columns.candidates)
        scores = _scores(members, columns, values)
        optional = dict(_optional(members, columns))
        return Group(
            id=row.id,
            prompt=_prompt(row, columns, scores, optional.get("captions")),
            candidates=tuple(
                _media(value, _key(columns.candidates, place), root, row.origin) for place, value in enumerate(values)
            ),
            scores=scores,
            origin=row.origin,
            columns=optional,
        )
    except UserError:
        raise
    except ValueError as error:
        return row.skipped(str(error).removeprefix(f"{row.origin}: "))


def _media(value: Any, key: str, root: Path, origin: str) -> Media:
    """A candidate as a row has it under `key`: its bytes, or a path relative to `root`."""
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys():  # the Image feature of `datasets`
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ValueError(f"{key}: an image is missing")
    return value if isinstance(value, bytes) else existing(value, key, root, origin)


def _values(members: Sequence[Row], names: Names) -> list[Any]:
    """One value per candidate: of several columns, of a list in one column, or of one column in several rows."""
    if isinstance(names, list):
        return [members[0].values.get(name) for name in names]
    if len(members) > 1:
        return [member.values.get(names) for member in members]
    value = members[0].values.get(names)
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{names!r} is not a list: {error}") from error
    return value if isinstance(value, list) else [value]


def _scores(members: Sequence[Row], columns: Columns, candidates: list[Any]) -> tuple[float, ...]:
    k = len(candidates)
    if k == 0:
        raise ValueError("no candidates")
    if columns.best_first:
        return tuple((k - 1 - place) / (k - 1) if k > 1 else 1.0 for place in range(k))
    if columns.winner is not None:
        return won(members[0], columns.winner, columns.candidates, candidates)
    names: Names = getattr(columns, columns.order)
    values = _values(members, names)
    if len(values) != k:
        raise ValueError(f"{k} candidates, but {len(values)} {columns.order}")
    numbers = [_number(value, _key(names, place)) for place, value in enumerate(values)]
    if columns.order == "ranks" and k > 1:
        numbers = majority(-np.array([numbers])).tolist()
    elif columns.order == "votes":
        if min(numbers) < 0 or sum(numbers) == 0:
            raise ValueError(f"votes must not be negative, nor all of them 0; found {shown(values)}")
        numbers = [number / sum(numbers) for number in numbers]
    elif columns.order == "shares" and (min(numbers) < 0 or abs(sum(numbers) - 1) > SHARES_TOLERANCE):
        keys = " and ".join(_key(names, place) for place in range(k))
        raise ValueError(f"{keys} must lie in [0, 1] and add up to 1, found {' and '.join(map(str, numbers))}")
    return tuple(numbers)


def _optional(members: Sequence[Row], columns: Columns) -> Iterator[tuple[str, Any]]:
    """The optional columns that have a value."""
    for name, where in columns.optional.items():
        if COLUMNS[name].per_candidate:
            value: Any = _values(members, where)
            absent = value != [] and all(one is None for one in value)
        else:
            value = members[0].values.get(str(where))
            absent = value in (None, "")
        if not absent:
            yield name, COLUMNS[name].parse(value, " and ".join(where if isinstance(where, list) else [where]))


def _prompt(row: Row, columns: Columns, scores: Sequence[float], captions: Sequence[str] | None) -> str:
    value = row.values.get(columns.prompt) if columns.prompt else None
    if value is None and captions:
        return captions[scores.index(max(scores))]
    if value is None:
        raise ValueError(f"no {columns.prompt or 'captions'!r}")
    if not isinstance(value, str):
        raise ValueError(f"{columns.prompt!r} must be text, found {shown(value)}")
    return value


def _number(value: Any, key: str) -> float:
    if (number := finite(value)) is None:
        raise ValueError(f"{key} must be a finite number, found {shown(value)}")
    return number


def _key(names: Names, place: int) -> str:
    """How messages name a candidate's value."""
    return repr(names[place]) if isinstance(names, list) else f"{names!r} [{place}]"
