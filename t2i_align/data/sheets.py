"""Rows of text files and spreadsheets: JSON Lines and .json lists, CSV and TSV, Excel."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from t2i_align.data.schema import Row, Skipped, Values
from t2i_align.errors import UserError
from t2i_align.utils.parsing import as_object, check_distinct, check_not_empty, parse_json

JSON, CSV, EXCEL = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".xlsx",)
DELIMITERS = ",;\t"  # spreadsheets of half of Europe write semicolons into a .csv
MAX_FIELD = 16 << 20  # characters of a CSV field; a quote that is never closed must not swallow a file of any size
ENTRY = "an object with keys such as 'prompt'"


def header(file: Path) -> list[str]:
    """The names of the columns of a CSV, TSV or Excel file."""
    if file.suffix.lower() in EXCEL:
        return next(_sheet(file))
    with _csv_reader(file) as (names, _):
        return names


def rows(file: Path, name: str) -> Iterator[Row | Skipped]:
    """The rows of a file of one of these kinds; `name` begins their ids."""
    kind = file.suffix.lower()
    if kind in CSV:
        yield from _csv_rows(file, name)
    elif kind in JSON:
        for number, origin, entry in json_entries(file):
            yield Row(f"{name}:{number}", origin, entry)
    else:
        names, *lines = _sheet(file)
        for number, line in enumerate(lines):
            yield Row(f"{name}:{number}", f"{file}, row {number}", dict(zip(names, line, strict=True)))


def json_entries(file: Path) -> Iterator[tuple[int, str, Values]]:
    """The objects of a JSON list or JSON Lines: place (from 0) or line (from 1), what to call it in messages, values.

    The content says which it is: `datasets` and pandas write lines into a .json.

    Raises:
        UserError: empty, not valid JSON (with the line), or an entry that is no object.
    """
    check_not_empty(file)
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
            # Of a .csv, that of DELIMITERS which its header has most of.
            delimiter = "\t" if file.suffix.lower() == ".tsv" else max(DELIMITERS, key=stream.readline().count)
            stream.seek(0)
            as_text = delimiter == "\t" and _quotes_are_text(stream)
            quoting: Literal[0, 3] = csv.QUOTE_NONE if as_text else csv.QUOTE_MINIMAL
            reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
            if not (header := next(reader, [])):
                raise UserError(f"{file}: the file is empty; expected a first line with the columns' names")
            check_distinct(file, header)
            yield header, reader
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: not valid CSV: {error}") from error


def _quotes_are_text(stream: TextIO) -> bool:
    """Whether quotation marks between tabs enclose no fields, as in PartiPrompts."""
    try:
        for _ in csv.reader(stream, delimiter="\t", strict=True):
            pass
    except csv.Error:
        return True
    finally:
        stream.seek(0)
    return False


def _sheet(file: Path) -> Iterator[list[Any]]:
    """The header and the rows of an Excel file's active sheet, without empty rows.

    Raises:
        UserError: openpyxl is not installed, or this is no Excel file, is empty, or has columns without a name.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(f"{file}: Excel files need openpyxl: pip install 't2i-align[xlsx]'") from error
    check_not_empty(file)
    try:
        sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).active
    except Exception as error:  # zipfile, xml and openpyxl each raise their own
        raise UserError(f"{file}: not a readable Excel file (damaged?): {error}") from error
    lines = (list(line) for line in (sheet.iter_rows(values_only=True) if sheet else ()))
    filled = (line for line in lines if any(value is not None for value in line))
    header = [str(name).strip() for name in next(filled, []) if name is not None]
    if not header:
        raise UserError(f"{file}: its active sheet is empty; expected a first row with the columns' names")
    check_distinct(file, header)
    yield header
    for line in filled:
        yield (line + [None] * len(header))[: len(header)]
