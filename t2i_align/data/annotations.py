"""Annotations: what captioners, perturbers and scorers add to a source, in files beside it (JSONL or parquet).

    {"id": "d.jsonl:1", "captions": ["a red fox in snow", "a fox"]}
    {"id": "d.jsonl:2", "scores": [0.31, 0.27], "negative_caption": "a red owl"}

"id" is the group's, and any of "scores" and "captions" (one per candidate), "negative_caption" and "user" stand in for
what the source says; other keys are left alone. Candidates are in the order in which the source lists them: `images` of
a JSONL entry, chosen and rejected, winner and loser, `jpg_0` and `jpg_1`. `readers.read` with best_first=False gives
them like that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from t2i_align.data import jsonl, parquet
from t2i_align.data.schema import COLUMNS, SCORES, Column, Group, Skipped
from t2i_align.errors import UserError

ID = Column("id")


def annotated_columns() -> dict[str, Column]:
    """What annotations may give."""
    return {"scores": SCORES, **COLUMNS}


class Value(NamedTuple):
    """What a row says, and what to call that row in messages."""

    value: Any
    origin: str


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Values by group id and column. files: those that give a column, for each column that is given at all."""

    entries: dict[str, dict[str, Value]] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, files: Sequence[str | Path]) -> Annotations:
        """Read sidecar files, whose order is of no account.

        Raises:
            UserError: no such file, broken, without rows; a row without an id or any column, with a value of the wrong
                type or a number that is not finite; an id twice in a file, or a column of it in two files.
        """
        entries: dict[str, dict[str, Value]] = {}
        given: dict[str, list[str]] = {}
        for file in checked(files):
            for name in _collect(file, entries):
                given.setdefault(name, []).append(str(file))
        return cls(entries=entries, files=given)

    def annotated(self, group: Group) -> Group | Skipped:
        """The group, in the source's order, with what is said of it here.

        A column that annotations give is one that every group must have. What they leave out stays the source's, but
        not scores: some of the source's and some of a scorer's would be on two scales.

        Raises:
            UserError: not one value per candidate.
        """
        found, known = self.entries.get(group.id, {}), annotated_columns()
        for name, files in self.files.items():
            if name not in found and (name == "scores" or getattr(group, name) is None):
                return Skipped(id=group.id, origin=group.origin, reason=f"no {name!r} for it in {', '.join(files)}")
        for name, (value, origin) in found.items():
            if known[name].per_candidate and len(value) != len(group.candidates):
                raise UserError(
                    f"{origin}: {name!r} must have one value for each of the {len(group.candidates)} candidates of "
                    f"group {group.id!r} ({group.origin}), found {len(value)}"
                )
        return replace(group, **{name: value for name, (value, _) in found.items()}) if found else group


NONE = Annotations()


def checked(files: Sequence[str | Path]) -> list[Path]:
    """The files; raises UserError where one is none, or of an unknown kind."""
    for file in map(Path, files):
        if not file.is_file():
            raise UserError(f"data.annotations: {file}: no such file")
        if file.suffix not in (".jsonl", ".json", ".parquet"):
            raise UserError(f"data.annotations: {file}: expected a .jsonl, .json or .parquet file")
    return [Path(file) for file in files]


def sidecar_identity(files: Sequence[str | Path]) -> list[str]:
    """A hash of each file's contents, in an order that does not depend on theirs."""
    digests = []
    for file in checked(files):
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest()[:16])
    return sorted(digests)


def _rows(file: Path) -> Iterator[tuple[str, jsonl.Entry]]:
    if file.suffix != ".parquet":
        yield from ((origin, entry) for _, origin, entry in jsonl.entries(file))
        return
    for number, row in enumerate(parquet.rows(file, ("id", *annotated_columns()))):
        yield f"{file}, row {number}", row


def _collect(file: Path, entries: dict[str, dict[str, Value]]) -> list[str]:
    """Add a file's values to those by id and column; returns the columns that it gives."""
    known = annotated_columns()
    given: dict[str, None] = {}
    seen: dict[str, str] = {}
    for origin, row in _rows(file):
        columns = [name for name in known if name in row]
        if "id" not in row or not columns:
            found = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{origin}: expected 'id' with any of {', '.join(map(repr, known))}; found {found}")
        group_id = _parsed(row, ID, origin)
        if group_id in seen:
            raise UserError(f"{origin}: the id {group_id!r} is there already: {seen[group_id]}")
        seen[group_id] = origin
        values = entries.setdefault(group_id, {})
        for name in columns:
            if row[name] is None:  # parquet has no other way to leave a value out
                continue
            if name in values:
                raise UserError(f"{origin}: {name!r} of id {group_id!r} is given already: {values[name].origin}")
            values[name] = Value(_parsed(row, known[name], origin), origin)
            given[name] = None
    if not seen:
        raise UserError(f"{file}: no rows in it")
    return list(given)


def _parsed(row: jsonl.Entry, column: Column, origin: str) -> Any:
    try:
        return column.parse(row[column.name])
    except ValueError as error:
        raise UserError(f"{origin}: {column.name!r} {error}") from error
