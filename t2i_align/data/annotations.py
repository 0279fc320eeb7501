"""Annotations: what captioners, perturbers and scorers add to a source, in files beside it (JSONL or parquet).

    {"id": "d.jsonl:1", "captions": ["a red fox in snow", "a fox"]}
    {"id": "d.jsonl:2", "scores": [0.31, 0.27], "negative_caption": "a red owl"}

"id" is the group's; "scores" (one per candidate) and the columns of `schema.COLUMNS` replace the source's; other keys
are left alone. Candidates are in the order in which the source lists them: `images` of a JSONL entry, chosen and
rejected, winner and loser, `jpg_0` and `jpg_1`. `readers.read` with best_first=False gives them like that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from t2i_align.data import tables
from t2i_align.data.schema import COLUMNS, ID, SCORES, Group, Skipped
from t2i_align.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


class Value(NamedTuple):
    """A value and how messages name its row."""

    value: Any
    origin: str


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Values by group id and column. files: for each column, the files that give it."""

    entries: dict[str, dict[str, Value]] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, files: Sequence[str | Path]) -> Annotations:
        """Read sidecar files, in any order.

        Raises:
            UserError: no such file, broken, without rows; a row without an id or any column, with a value of the wrong
                type or a number that is not finite; an id twice in a file, or a column of it in two files.
        """
        annotations = cls()
        for file in checked(files):
            annotations._add(file)
        return annotations

    def annotated(self, group: Group) -> Group | Skipped:
        """The group, in the source's order, with its annotations.

        A column that annotations give is one that every group must have. What they leave out stays the source's, but
        not scores: some of the source's and some of a scorer's would be on two scales.

        Raises:
            UserError: not one value per candidate.
        """
        own = self.entries.get(group.id, {})
        for name, files in self.files.items():
            if name not in own and (name == "scores" or name not in group.columns):
                return group.skipped(f"no {name!r} for it in {', '.join(files)}")
        for name, (value, origin) in own.items():
            if isinstance(value, tuple) and len(value) != len(group.candidates):
                raise UserError(
                    f"{origin}: {name!r} must have one value for each of the {len(group.candidates)} candidates of "
                    f"group {group.id!r} ({group.origin}), found {len(value)}"
                )
        columns = {name: value for name, (value, _) in own.items()}
        return replace(group, scores=columns.pop("scores", group.scores), columns={**group.columns, **columns})

    def _add(self, file: Path) -> None:
        known = {"scores": SCORES, **COLUMNS}
        seen: dict[str, str] = {}
        for row in tables.rows(file, ["id", *known]):
            assert not isinstance(row, Skipped), "a single file has no missing shards"
            _, origin, given = row
            columns = [name for name in known if name in given]
            if "id" not in given or not columns:
                keys = ", ".join(map(repr, given)) or "none"
                expected = ", ".join(map(repr, known))
                raise UserError(f"{origin}: expected 'id' with any of {expected}; found {keys}")
            try:
                group_id = ID.parse(given["id"], "id")
                # A column of a parquet file has no other way than null to leave a value out.
                parsed = {n: known[n].parse(given[n], n) for n in columns if given[n] is not None}
            except ValueError as error:
                raise UserError(f"{origin}: {error}") from error
            if group_id in seen:
                raise UserError(f"{origin}: the id {group_id!r} is there already: {seen[group_id]}")
            seen[group_id] = origin
            values = self.entries.setdefault(group_id, {})
            for name, value in parsed.items():
                if name in values:
                    raise UserError(f"{origin}: {name!r} of id {group_id!r} is given already: {values[name].origin}")
                values[name] = Value(value, origin)
                if str(file) not in (files := self.files.setdefault(name, [])):
                    files.append(str(file))
        if not seen:
            raise UserError(f"{file}: no rows in it")


NONE = Annotations()


def checked(files: Sequence[str | Path]) -> list[Path]:
    """The files; raises UserError where one does not exist or is of an unknown kind."""
    for file in map(Path, files):
        if not os.path.isfile(file):  # which a name that is too long does not disturb
            raise UserError(f"data.annotations: {file}: no such file")
        if tables.kind(file) not in SUFFIXES:
            raise UserError(f"data.annotations: {file}: expected a .jsonl, .json or .parquet file")
    return [Path(file) for file in files]


def sidecar_identity(files: Sequence[str | Path]) -> list[str]:
    """A hash of each file's contents, in an order that does not depend on theirs."""
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in checked(files))
