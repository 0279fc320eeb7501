"""A table that is written in batches of rows and continues after a kill.

FILE                  the rows: JSONL, or parquet that `merge` writes
.FILE.RANK.jsonl      part file: the rows of one process until `merge`; rank 0 appends to a JSONL FILE itself
FILE.skipped.jsonl    what has no row, and why
FILE.settings.json    what the rows are made with, and whether all are there
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2i_align.errors import UserError
from t2i_align.utils.files import (
    append_line,
    atomic_file,
    claim,
    json_lines,
    output_lock,
    read_json,
    whole_lines,
    write_json,
    write_text,
)

Row = dict[str, Any]
JSONL, PARQUET, SKIPPED = ".jsonl", ".parquet", ".skipped.jsonl"
ADVICE = "choose another file, or --force to make it anew"


class ResumableTable:
    """Rows in the file `out`, each with its own primary key; nothing is written before `begun`.

    Args:
        out: .jsonl file, or with a schema also .parquet.
        key: columns that identify a row.
        schema: of the parquet file.
        rank: of this process, where several write together.

    Raises:
        UserError: a name with another ending, or a folder.
    """

    def __init__(
        self, out: str | Path, key: Sequence[str] = ("id",), *, schema: pa.Schema | None = None, rank: int = 0
    ) -> None:
        self.out = Path(os.path.realpath(Path(out).expanduser()))  # a link stays one
        endings = (JSONL, PARQUET) if schema else (JSONL,)
        if self.out.suffix not in endings or self.out.is_dir():
            raise UserError(f"{out}: expected a file that ends in {' or '.join(endings)}")
        self.key, self.schema, self.rank = tuple(key), schema, rank
        direct = rank == 0 and self.out.suffix == JSONL
        self.file = self.out if direct else self.out.with_name(f".{self.out.name}.{rank}{JSONL}")
        self.settings_file = Path(f"{self.out}.settings.json")
        self.skipped_file = Path(f"{self.file}{SKIPPED}")

    def check_own(self, *, force: bool = False) -> None:
        """Raise UserError for a file of something else, or a finished one unless `force`; asked before long work."""
        if self.out.exists() and not self.settings_file.exists():
            raise UserError(f"{self.out}: exists, and was not made by this command; choose another file")
        if not force and self.out.exists() and read_json(self.settings_file).get("finished"):
            raise UserError(f"{self.out}: exists and is finished; {ADVICE}")

    def check_not_read(self, inputs: Iterable[str | Path]) -> None:
        """Raise UserError where one of the files to write is one of the inputs, which --force would remove."""
        own = [file for file in (self.out, self.skipped_file, self.settings_file) if file.exists()]
        for file in map(Path, inputs):
            if file.exists() and any(file.samefile(one) for one in own):
                raise UserError(f"{file}: is read to make {self.out}; choose another file to write")

    @contextmanager
    def begun(self, settings: Row | None = None, *, force: bool = False) -> Iterator[None]:
        """Lock the table, start or continue it, and repair a half-written last line.

        Args:
            settings: what the rows are made with; None keeps no record of it.
            force: drop what is there; of several processes, the first one does, before the others begin.

        Raises:
            UserError: it was begun with other settings, names them; it holds rows of another kind; or another run
                writes it.
        """
        with output_lock(self.out if self.rank == 0 else self.file, file=True):
            claimed = self.settings_file.exists() and "settings" in read_json(self.settings_file)
            if self.rank == 0 and (force or (claimed and not self.out.exists())):
                for file in (self.out, self.skipped_file, self.settings_file, *self._parts(), *self._parts(SKIPPED)):
                    file.unlink(missing_ok=True)
            if settings is not None:
                claim(self.settings_file, {"finished": False, "settings": settings}, advice=ADVICE)
            self.keys = {self.key_of(row) for row in self.rows()}
            self.skipped = {(row["id"], row["origin"]) for row in self.skips()}
            self._repair(self.file, self.key[0])
            self._repair(self.skipped_file, "id")
            yield

    def key_of(self, row: Row) -> tuple[Any, ...]:
        """The primary key of a row."""
        return tuple(row[name] for name in self.key)

    def rows(self) -> Iterator[Row]:
        """The rows that all processes have written, each once."""
        seen = set()
        for file in (self.out, *self._parts()):
            for row in _with(self.key, self._read(file), file):
                if (key := self.key_of(row)) not in seen:
                    seen.add(key)
                    yield row

    def skips(self) -> Iterator[Row]:
        """What all processes have skipped: id, origin and reason."""
        for file in (Path(f"{self.out}{SKIPPED}"), *self._parts(SKIPPED)):
            yield from _with(("id", "origin", "reason"), whole_lines(file, repair=False), file)

    def add(self, rows: Sequence[Row], skipped: Sequence[Row] = ()) -> None:
        """Append the rows and skips that are not there yet."""
        new = {self.key_of(row): row for row in rows}
        append_line(self.file, *(row for key, row in new.items() if key not in self.keys))
        self.keys |= new.keys()
        skips = {(row["id"], row["origin"]): row for row in skipped}
        append_line(self.skipped_file, *(row for key, row in skips.items() if key not in self.skipped))
        self.skipped |= skips.keys()

    def merge(self) -> None:
        """Move the part files into `out`, when all processes are done."""
        parts = self._parts()
        if self.out.suffix == PARQUET and parts:
            with atomic_file(self.out) as temporary:
                pq.write_table(pa.Table.from_pylist(list(self.rows()), self.schema), temporary)
        elif parts:
            there = {self.key_of(row) for row in self._read(self.out)}
            append_line(self.out, *(row for row in self.rows() if self.key_of(row) not in there))
        if others := self._parts(SKIPPED):
            rows = {(row["id"], row["origin"]): row for row in self.skips()}
            write_text(Path(f"{self.out}{SKIPPED}"), json_lines(rows.values()))
        for part in (*parts, *others):
            part.unlink()

    def finish(self) -> None:
        """Record that all rows are there."""
        write_json(self.settings_file, read_json(self.settings_file) | {"finished": True})

    def _parts(self, ending: str = "") -> list[Path]:
        """The part files of rows, or with the ending SKIPPED of what has none."""
        start, ending = f".{self.out.name}.", f"{JSONL}{ending}"
        files = self.out.parent.glob(f"{escape(start)}*{ending}")
        return sorted(file for file in files if file.name.removeprefix(start).removesuffix(ending).isdigit())

    def _read(self, file: Path) -> list[Row]:
        if file.suffix == JSONL or not file.is_file():
            return whole_lines(file, repair=False)
        try:
            rows = pq.read_table(file).to_pylist(maps_as_pydicts="strict")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable parquet file: {error}") from error
        return [{name: v for name, v in row.items() if v is not None or name in self.key} for row in rows]

    def _repair(self, file: Path, first: str) -> None:
        """Cut off or end a half-written last line, if it begins with the column `first` as all of ours do."""
        if not file.exists():
            return
        begin, tail = f'{{"{first}": '.encode(), file.read_bytes().rpartition(b"\n")[2]
        if not (tail.startswith(begin) or begin.startswith(tail)):
            raise UserError(f"{file}: its last line has no end and is none of this table's; choose another output file")
        whole_lines(file)


def _with(names: Sequence[str], rows: Iterable[Row], file: Path) -> Iterator[Row]:
    """The rows; raises UserError where one lacks one of these columns."""
    for number, row in enumerate(rows, 1):
        if missing := [name for name in names if name not in row]:
            raise UserError(f"{file}, row {number}: has no {missing[0]!r}; choose another output file")
        yield row
