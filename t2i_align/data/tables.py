"""Tables of any kind, row by row: JSON Lines and .json lists, CSV and TSV, parquet, and webdataset shards.

A shard that its neighbours' numbers say should be there (`train-00001-of-00003.parquet`, `000001.tar`) and is not
becomes a `Skipped` in its place.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from t2i_align.data import jsonl, parquet, webdataset
from t2i_align.data.schema import Skipped
from t2i_align.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")
SHARDED = (".parquet", ".tar")  # kinds that come as a folder of numbered files
NUMBERED = re.compile(r"^(.*?)(\d{3,})(-of-(\d+))?(\.\w+)$")
LEFT_OUT = b"left out"  # stands for an image where images are not wanted
MAX_FIELD = 16 << 20  # characters of a CSV field; a quote that is never closed must not swallow a file of any size


class Row(NamedTuple):
    """A row: its place as an id, what to call it in messages, its values by column."""

    id: str
    origin: str
    values: dict[str, Any]


def files(path: Path) -> list[Path]:
    """The files that make up a table: itself, or all parquet files below a folder, or all webdataset shards."""
    if path.is_file():
        return [path]
    return next((found for suffix in SHARDED if (found := below(path, suffix))), [])


def below(folder: Path, suffix: str) -> list[Path]:
    """All files of a kind below a folder; some programs write a folder of that name with the files in it."""
    return sorted(file for file in folder.rglob(f"*{suffix}") if not file.is_dir())


def columns(path: Path) -> list[str]:
    """The names of a table's columns, from its first file alone; of lines and samples, those of the first."""
    found = files(path)
    if not found or found[0].suffix not in SUFFIXES:
        return []
    return list(_columns(found[0], found[0].stat().st_mtime_ns))


@lru_cache(maxsize=64)  # several layouts ask, and a .json list has to be read whole
def _columns(file: Path, changed: int) -> tuple[str, ...]:
    if file.suffix == ".parquet":
        return tuple(parquet.open_parquet(file).schema_arrow.names)
    if file.suffix in (".csv", ".tsv"):
        with _opened(file) as reader:
            return tuple(_header(file, reader))
    first = next((row for row in _rows(file, file.name, None, images=False) if isinstance(row, Row)), None)
    return tuple(first.values) if first else ()


def rows(path: Path, names: Sequence[str] | None = None, *, images: bool = True) -> Iterator[Row | Skipped]:
    """The rows of a table, streamed, with the columns `names` (default: all) of those that there are.

    Ids are `<file>:<row>`, as the readers of JSON Lines and parquet give them. Without `images`, those that lie in
    the table itself are LEFT_OUT.

    Raises:
        UserError: no file of a known kind, or one that is broken as a whole.
    """
    found = files(path)
    if not found:
        raise UserError(f"{path}: no table in this folder (files ending in {' or '.join(SHARDED)})")
    root = path if path.is_dir() else path.parent
    missing = missing_shards(found)
    for file in found:
        yield from missing.pop(file, [])
        yield from _rows(file, file.relative_to(root).as_posix(), names, images)


def missing_shards(found: Sequence[Path]) -> dict[Path, list[Skipped]]:
    """For each file of numbered shards, those that should come right before it and are not there."""
    out: dict[Path, list[Skipped]] = {}
    before: dict[tuple[Path, str, str], int] = {}
    for file in found:
        if match := NUMBERED.match(file.name):
            start, number, total, _, suffix = match.groups()
            series = (file.parent, start, total or "")
            expected = before.get(series, -1 if total else int(number) - 1) + 1
            names = [f"{start}{n:0{len(number)}d}{total or ''}{suffix}" for n in range(expected, int(number))]
            out[file] = [_missing(file.parent / name) for name in names]
            before[series] = int(number)
    return {file: skips for file, skips in out.items() if skips}


def _missing(file: Path) -> Skipped:
    return Skipped(id=file.name, origin=str(file), reason="this shard is missing; none of its rows is used")


def _rows(file: Path, name: str, names: Sequence[str] | None, images: bool) -> Iterator[Row | Skipped]:
    if file.suffix in (".jsonl", ".json"):
        yield from (Row(f"{name}:{n}", origin, entry) for n, origin, entry in jsonl.entries(file))
    elif file.suffix in (".csv", ".tsv"):
        yield from _csv_rows(file, name)
    elif file.suffix == ".parquet":
        schema = parquet.open_parquet(file).schema_arrow
        wanted = [column for column in schema.names if names is None or column in names]
        left_out = {column: LEFT_OUT for column in wanted if not images and _holds_bytes(schema.field(column).type)}
        for number, row in enumerate(parquet.rows(file, [column for column in wanted if column not in left_out])):
            yield Row(f"{name}:{number}", f"{file}, row {number}", {**row, **left_out})
    elif file.suffix == ".tar":
        for sample in webdataset.samples(file, images=images):
            if isinstance(sample, Skipped):
                yield sample
            else:
                key, values = sample
                yield Row(f"{name}:{key}", f"{file}, sample {key!r}", values)
    else:
        raise UserError(f"{file}: not a table; known endings: {', '.join(SUFFIXES)}")


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)


def _csv_rows(file: Path, name: str) -> Iterator[Row | Skipped]:
    with _opened(file) as reader:
        header = _header(file, reader)
        for number, fields in enumerate(row for row in reader if row):
            origin = f"{file}, row {number}"
            if len(fields) != len(header):
                reason = f"{len(fields)} fields, but {len(header)} columns"
                yield Skipped(id=f"{name}:{number}", origin=origin, reason=reason)
                continue
            values = {key: value if value else None for key, value in zip(header, fields, strict=True)}
            yield Row(f"{name}:{number}", origin, values)


def _header(file: Path, reader: Any) -> list[str]:
    header: list[str] = next(reader, [])
    if not header:
        raise UserError(f"{file}: the file is empty; expected a first line with the columns' names")
    if len(set(header)) < len(header):
        raise UserError(f"{file}: two columns of the same name among {', '.join(header)}")
    return header


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A CSV or TSV file's reader; what it cannot read is an error that names file and line."""
    csv.field_size_limit(MAX_FIELD)
    with open(file, newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            yield reader
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: not valid CSV: {error}") from error
