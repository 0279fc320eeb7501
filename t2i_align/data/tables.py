"""Rows of tables of any kind: JSON Lines and .json lists, CSV and TSV, parquet, Excel, webdataset shards."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2i_align.data import shards, webdataset
from t2i_align.data.paths import inside, spellings
from t2i_align.data.schema import LEFT_OUT, Media, Row, Skipped, Values
from t2i_align.errors import UserError, shown
from t2i_align.utils.parsing import as_object, parse_json

JSON, CSV = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
WITH_HEADER = (*CSV, ".parquet", ".xlsx")
SUFFIXES = (*JSON, *CSV, ".xlsx", *shards.SHARDED)
DELIMITERS = ",;\t"  # spreadsheets of half of Europe write semicolons into a .csv
ROWS_AT_ONCE = 32  # images of so many rows are held in memory
PROMPT_KEYS = ("prompt", "caption", "text")  # what prompts are called, in this order
MAX_FIELD = 16 << 20  # characters of a CSV field; a quote that is never closed must not swallow a file of any size
NO_PATH = re.compile(
    r"(?P<uri>data:)|(?P<address>\w+://)|(/9j/|iVBORw0KGgo|[A-Za-z0-9+/\s]{512})[A-Za-z0-9+/\s]*=*$"
)  # the last is base64, of JPEG, PNG or anything long
ENTRY = "an object with keys such as 'prompt'"
DAMAGED = (pa.ArrowException, OSError, ValueError)  # ValueError: what Python has no value for


def kind(file: Path) -> str:
    """A file's ending in small letters, which says what it is."""
    return file.suffix.lower()


def files(path: Path, split: str = shards.TRAIN) -> list[Path]:
    """The files that make up a table: itself, or those of a folder. Raises UserError as `shards.files` does."""
    return [path] if path.is_file() else shards.files(path, split)


def columns(file: Path) -> list[str]:
    """The names of a file's columns; of lines and samples, those of the first."""
    if not file.is_file() or kind(file) not in SUFFIXES:
        return []
    return list(_columns(file, file.stat().st_mtime_ns))


@lru_cache(maxsize=64)  # several layouts ask, and a .json list has to be read whole
def _columns(file: Path, changed: int) -> tuple[str, ...]:
    if kind(file) == ".parquet":
        return tuple(open_parquet(file).schema_arrow.names)
    if kind(file) in CSV:
        with _csv_reader(file) as (header, _):
            return tuple(header)
    if kind(file) == ".xlsx":
        return tuple(next(_sheet(file)))
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
    elif kind(file) in CSV:
        yield from _csv_rows(file, name)
    elif kind(file) == ".xlsx":
        header, *lines = _sheet(file)
        for number, line in enumerate(lines):
            yield Row(f"{name}:{number}", f"{file}, row {number}", dict(zip(header, line, strict=True)))
    elif kind(file) == ".parquet":
        yield from _parquet_rows(file, name, names, images)
    elif kind(file) in JSON:
        for number, origin, entry in json_entries(file):
            yield Row(f"{name}:{number}", origin, entry)
    else:
        raise UserError(f"{file}: not a table; known endings: {', '.join(SUFFIXES)}")


# Text ---------------------------------------------------------------------------------------------------------------


def json_entries(file: Path) -> Iterator[tuple[int, str, Values]]:
    """The objects of a JSON list or JSON Lines: place (from 0) or line (from 1), what to call it in messages, values.

    The content says which it is: `datasets` and pandas write lines into a .json.

    Raises:
        UserError: empty, not valid JSON (with the line), or an entry that is no object.
    """
    _check_not_empty(file)
    with open(file, "rb") as stream:
        start = next((line for line in stream if line.strip()), b"").removeprefix(codecs.BOM_UTF8).lstrip()
        stream.seek(0)
        if start.startswith(b"["):
            for number, entry in enumerate(parse_json(stream.read(), str(file))):
                yield number, (origin := f"{file}, entry {number}"), as_object(entry, origin, ENTRY)
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, (origin := f"{file}, line {number}"), as_object(parse_json(line, origin), origin, ENTRY)


def _csv_rows(file: Path, name: str) -> Iterator[Row | Skipped]:
    with _csv_reader(file) as (header, reader):
        for number, fields in enumerate(row for row in reader if row):
            values = {key: value or None for key, value in zip(header, fields, strict=False)}
            row = Row(f"{name}:{number}", f"{file}, row {number}", values)
            fits = len(fields) == len(header)
            yield row if fits else row.skipped(f"{len(fields)} fields, but {len(header)} columns")


@contextmanager
def _csv_reader(file: Path) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """The columns of a CSV or TSV file and a reader of its rows; what cannot be read is an error with file and line."""
    csv.field_size_limit(MAX_FIELD)
    with open(file, newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            delimiter = delimiter_of(file, stream.readline())
            stream.seek(0)
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            if not (header := next(reader, [])):
                raise UserError(f"{file}: the file is empty; expected a first line with the columns' names")
            _check_distinct(file, header)
            yield header, reader
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: not valid CSV: {error}") from error


def delimiter_of(file: Path, header: str) -> str:
    """What separates the columns of a CSV or TSV file: of a .csv, that of DELIMITERS which its header has most of."""
    return "\t" if kind(file) == ".tsv" else max(DELIMITERS, key=header.count)


def _sheet(file: Path) -> Iterator[list[Any]]:
    """The header and the rows of an Excel file's active sheet, without empty rows.

    Raises:
        UserError: openpyxl is not installed, or this is no Excel file, is empty, or has columns without a name.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(f"{file}: Excel files need openpyxl: pip install 't2i-align[xlsx]'") from error
    _check_not_empty(file)
    try:
        sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).active
    except Exception as error:  # zipfile, xml and openpyxl each raise their own
        raise UserError(f"{file}: not a readable Excel file (damaged?): {error}") from error
    lines = (list(line) for line in (sheet.iter_rows(values_only=True) if sheet else ()))
    filled = (line for line in lines if any(value is not None for value in line))
    header = [str(name).strip() for name in next(filled, []) if name is not None]
    if not header:
        raise UserError(f"{file}: its active sheet is empty; expected a first row with the columns' names")
    _check_distinct(file, header)
    yield header
    for line in filled:
        yield (line + [None] * len(header))[: len(header)]


def _check_not_empty(file: Path) -> None:
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")


def _check_distinct(file: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{file}: two columns of the same name among {', '.join(names)}")


# Parquet ------------------------------------------------------------------------------------------------------------


def open_parquet(file: Path) -> pq.ParquetFile:
    """The file, memory-mapped. Raises UserError where it is empty or no parquet."""
    _check_not_empty(file)
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
    except DAMAGED as error:
        raise UserError(f"{file}: not a readable parquet file (damaged or cut short?): {error}") from error
    _check_distinct(file, parquet.schema_arrow.names)
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


# Cells ----------------------------------------------------------------------------------------------------------------


def media_of(value: Any, key: str, root: Path, origin: str) -> Media:
    """A candidate as a row has it under `key`: its bytes, or a path relative to `root`.

    Raises:
        ValueError: neither, or nothing there.
        UserError: a path that leaves `root`.
    """
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys():  # the Image feature of `datasets`
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ValueError(f"{key}: an image is missing")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected an image or its path, found {shown(value)}")
    if match := NO_PATH.match(value):
        what = "a data URI" if match["uri"] else "an address" if match["address"] else "base64 text"
        raise ValueError(f"{key}: {what}, expected an image's bytes or its path; found {shown(value)}")
    path = next((path for name in spellings(value) if os.path.exists(path := inside(root, name, origin))), None)
    if path is None:
        raise ValueError(f"no such image: {value}")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"not a regular file: {value}")
    return path
