"""Rows of tables of any kind: JSON Lines and .json lists, CSV and TSV, parquet, webdataset shards.

A sample of a webdataset shard, that is the members of one key (the name up to its first dot), is a row:

    000017.json            {"prompt": "a red fox", "scores": [3, 1]}
    000017.0.jpg  000017.1.jpg

Each member is a column named by the rest of its name, media without their ending (`0`), text as `label_0` for
`label_0.txt`; the keys of `json` are columns themselves. `images` lists the media in the order of their names. Nothing
is unpacked to disk, so names that lead elsewhere lead nowhere.

A shard that its neighbours' numbers say should be there (`train-00001-of-00003.parquet`, `000001.tar`) and is not
becomes a `Skipped` in its place.
"""

from __future__ import annotations

import csv
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from t2i_align.data.media import MEDIA_SUFFIXES
from t2i_align.data.schema import Skipped
from t2i_align.errors import UserError
from t2i_align.utils.files import as_object, parse_json

JSON, CSV = (".jsonl", ".json"), (".csv", ".tsv")
SHARDED = (".parquet", ".tar")  # kinds that come as a folder of numbered files
SUFFIXES = (*JSON, *CSV, *SHARDED)
NUMBERED = re.compile(r"^(.*?)(\d{3,})(-of-(\d+))?(\.\w+)$")
LEFT_OUT = b"left out"  # stands for an image where images are not wanted
ROWS_AT_ONCE = 32  # images of so many rows are held in memory
MAX_FIELD = 16 << 20  # characters of a CSV field; a quote that is never closed must not swallow a file of any size
MAX_MEMBER = 256 << 20  # bytes; what a tar header claims is not read into memory unseen
TEXTS = ("txt", "caption", "prompt")  # endings of text members
PROMPTS = ("prompt", "caption", "txt", "original_prompt")  # columns of a sample that hold its prompt
ENTRY = "an object with keys such as 'prompt'"
DAMAGED = (pa.ArrowException, OSError, ValueError)  # ValueError: what Python has no value for
Values = dict[str, Any]


class Row(NamedTuple):
    """A row: its place as an id, what to call it in messages, its values by column."""

    id: str
    origin: str
    values: Values

    def skipped(self, reason: str) -> Skipped:
        """The record of a row that cannot be used."""
        return Skipped(id=self.id, origin=self.origin, reason=reason)


def files(path: Path) -> list[Path]:
    """The files that make up a table: itself, or all parquet files below a folder, or all webdataset shards."""
    if path.is_file():
        return [path]
    # Some programs write a folder named like a file, with the files in it.
    below = ([file for file in path.rglob(f"*{suffix}") if not file.is_dir()] for suffix in SHARDED)
    return next((sorted(files) for files in below if files), [])


def columns(file: Path) -> list[str]:
    """The names of a file's columns; of lines and samples, those of the first."""
    if not file.is_file() or file.suffix not in SUFFIXES:
        return []
    return list(_columns(file, file.stat().st_mtime_ns))


@lru_cache(maxsize=64)  # several layouts ask, and a .json list has to be read whole
def _columns(file: Path, changed: int) -> tuple[str, ...]:
    if file.suffix == ".parquet":
        return tuple(open_parquet(file).schema_arrow.names)
    if file.suffix in CSV:
        with _csv_reader(file) as (header, _):
            return tuple(header)
    first = next((row for row in _rows(file, file.name, None, images=False) if isinstance(row, Row)), None)
    return tuple(first.values) if first else ()


def rows(
    path: Path, names: Sequence[str] | None = None, *, images: bool = True, part: Path | None = None
) -> Iterator[Row | Skipped]:
    """The rows of a table, streamed, with the columns `names` (default: all) of those that there are.

    Ids are `<file>:<row>`: the line of JSON Lines, else the number from 0, or the key of a sample. Without `images`,
    those that lie in the table itself are LEFT_OUT. With `part`, only the rows of this one of its files.

    Raises:
        UserError: no file of a known kind, or one that is broken as a whole.
    """
    parts = [part] if part else files(path)
    if not parts:
        raise UserError(f"{path}: no table in this folder (files ending in {' or '.join(SHARDED)})")
    root = path if path.is_dir() else path.parent
    missing = {} if part else _missing_shards(parts)
    for file in parts:
        yield from missing.get(file, [])
        yield from _rows(file, file.relative_to(root).as_posix(), names, images)


def _missing_shards(parts: Sequence[Path]) -> dict[Path, list[Skipped]]:
    """For each file of numbered shards, those that should come right before it and are not there."""
    missing: dict[Path, list[Skipped]] = {}
    last: dict[tuple[Path, str, str], int] = {}
    for file in parts:
        if match := NUMBERED.match(file.name):
            start, number, total, _, suffix = match.groups()
            series = (file.parent, start, total or "")
            expected = last.get(series, -1 if total else int(number) - 1) + 1
            names = [f"{start}{n:0{len(number)}d}{total or ''}{suffix}" for n in range(expected, int(number))]
            reason = "this shard is missing; none of its rows is used"
            missing[file] = [Skipped(id=name, origin=str(file.parent / name), reason=reason) for name in names]
            last[series] = int(number)
    return missing


def _rows(file: Path, name: str, names: Sequence[str] | None, images: bool) -> Iterator[Row | Skipped]:
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: not a table; known endings: {', '.join(SUFFIXES)}")
    if file.suffix == ".tar":
        yield from _samples(file, name, images)
    elif file.suffix in CSV:
        yield from _csv_rows(file, name)
    elif file.suffix == ".parquet":
        yield from _parquet_rows(file, name, names, images)
    else:
        for number, origin, entry in json_entries(file):
            yield Row(f"{name}:{number}", origin, entry)


# Text ---------------------------------------------------------------------------------------------------------------


def json_entries(file: Path) -> Iterator[tuple[int, str, Values]]:
    """The objects of a .jsonl or a .json list: line (from 1) or place (from 0), what to call it in messages, values.

    Raises:
        UserError: empty, not valid JSON (with the line), or an entry that is no object.
    """
    _check_not_empty(file)
    if file.suffix == ".json":
        entries = parse_json(file.read_bytes(), str(file))
        if not isinstance(entries, list):
            raise UserError(f"{file}: a .json file must hold one list of entries, found {type(entries).__name__}")
        for number, entry in enumerate(entries):
            yield number, (origin := f"{file}, entry {number}"), as_object(entry, origin, ENTRY)
        return
    with open(file, "rb") as stream:
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
        reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            if not (header := next(reader, [])):
                raise UserError(f"{file}: the file is empty; expected a first line with the columns' names")
            _check_distinct(file, header)
            yield header, reader
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: not valid CSV: {error}") from error


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
    except (pa.ArrowException, OSError) as error:
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


# Webdataset ---------------------------------------------------------------------------------------------------------


def _samples(file: Path, name: str, images: bool) -> Iterator[Row | Skipped]:
    key = ""
    try:
        with tarfile.open(file, "r:") as archive:
            members = (named for member in archive if (named := _named(member)))
            for key, own in groupby(members, key=itemgetter(0)):
                row = Row(f"{name}:{key}", f"{file}, sample {key!r}", {})
                try:
                    yield row._replace(values=_sample(archive, own, images))
                except UserError as error:
                    yield row.skipped(str(error))
            if file.stat().st_size < archive.offset + tarfile.BLOCKSIZE:  # cut between two members
                raise EOFError("it has no end mark")
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        after = f" after sample {key!r}" if key else ""
        raise UserError(f"{file}: cannot be read as a tar file{after} (damaged or cut short?): {error}") from error


def _named(member: tarfile.TarInfo) -> tuple[str, str, tarfile.TarInfo] | None:
    """The key of a member's sample and the member's column; None for what belongs to no sample."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, _, column = base.partition(".")
    if member.isdir() or not column or base.startswith("."):
        return None
    return f"{folder}/{stem}" if folder else stem, column, member


def _sample(archive: tarfile.TarFile, named: Iterator[tuple[str, str, tarfile.TarInfo]], images: bool) -> Values:
    """The columns of a sample. Raises UserError with the reason where it cannot be used."""
    values: Values = {}
    for _, column, member in named:
        kind = column.rpartition(".")[2]
        if kind in TEXTS:
            column = column.removesuffix(f".{kind}")
        if column in values:
            raise UserError(f"two members named {column!r}: samples of the same key must not follow each other")
        if not member.isfile():
            raise UserError(f"{column!r} is a link, not a file")
        if member.size > MAX_MEMBER:
            raise UserError(f"{column!r} has {member.size} bytes, more than {MAX_MEMBER}")
        if kind == "json":
            values |= as_object(parse_json(_content(archive, member), repr(column)), repr(column))
        elif kind in TEXTS:
            try:
                values[column] = _content(archive, member).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{column!r} is not UTF-8 text: {error}") from error
        else:
            values[column] = _content(archive, member) if images else LEFT_OUT
    media = sorted(column for column in values if column.lower().endswith(MEDIA_SUFFIXES))
    stems = [column.rpartition(".")[0] for column in media]
    for column, numbered in (("scores", "label"), ("captions", "caption")):
        if f"{numbered}_0" in values and not values.get(column):
            values[column] = [values.get(f"{numbered}_{place}") for place in range(len(media))]
    if values.get("winner") in stems:
        values["winner"] = stems.index(values["winner"])
    values["prompt"] = next((values[column] for column in PROMPTS if values.get(column)), None)
    values["images"] = [values[column] for column in media]
    return values | dict(zip(stems, values["images"], strict=True))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name}: {member.size} bytes expected, {len(content)} found")
    return content
