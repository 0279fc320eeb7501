"""Annotations in the making: a JSONL beside a source, written group by group, that continues after a kill.

Beside FILE lie FILE.settings.json, what it is made with, and FILE.skipped.jsonl, the groups that it lacks and why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from t2i_align.data import tables
from t2i_align.data.schema import Group, Skipped
from t2i_align.errors import UserError
from t2i_align.utils.files import output_lock

Row = dict[str, Any]
Annotate = Callable[[Sequence[Group]], Sequence[Row | Skipped]]
ENDING = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished file holds. why_skipped: the file that says it, if anything was skipped."""

    out: Path
    groups: int
    skipped: int
    why_skipped: Path | None


class ResumableTable:
    """The file of annotations `out`; nothing is written before `begun`.

    Raises:
        UserError: not a .jsonl file, or one that is finished or was not made here, unless `force`.
    """

    def __init__(self, out: str | Path, *, force: bool = False) -> None:
        self.out, self.force = Path(out).expanduser().resolve(), force  # what a link leads to is written
        self.settings_file = Path(f"{self.out}.settings.json")
        self.skipped_file = Path(f"{self.out}.skipped{ENDING}")
        if self.out.suffix != ENDING or self.out.is_dir():
            raise UserError(f"{out}: expected the name of a {ENDING} file to write")
        if force:
            return
        if self.out.exists() and not self.settings_file.exists():
            raise UserError(f"{out}: exists, and was not made by this command; choose another file, or --force")
        if self._stored().get("finished"):
            raise UserError(f"{out}: exists and is finished; choose another file, or --force to make it anew")

    @contextmanager
    def begun(self, settings: Row) -> Iterator[None]:
        """Start a file that is made with these settings, or continue it; no other run writes to it meanwhile.

        Raises:
            UserError: it was begun with other settings, says which; or another run is at it.
        """
        with output_lock(self.out, file=True):
            self.settings: Row = json.loads(json.dumps(settings))
            if self.force:
                for file in (self.out, self.skipped_file, self.settings_file):
                    file.unlink(missing_ok=True)
            if self.settings_file.exists():
                self._compare(self._stored())
            else:
                self._store(finished=False)
            self.written = {str(row["id"]) for row in _whole_lines(self.out)}
            self.skipped = {(row["id"], row["origin"]) for row in _whole_lines(self.skipped_file)}
            yield

    def fill(
        self, items: Iterable[Group | Skipped], annotate: Annotate, *, total: int, batch: int, progress: bool
    ) -> Summary:
        """Annotate a source's items, `batch` at a time, and say what came of it.

        A batch is always made of the same items, whole, so that a continued file equals an uninterrupted one even
        where a model's answer depends on what else is in its batch.

        Raises:
            UserError: not one group could be annotated.
        """
        items = iter(items)
        with tqdm(total=total, unit="group", desc=self.out.name, disable=not progress) as bar:
            while some := list(islice(items, batch)):
                if not all(map(self._has, some)):
                    made = iter(annotate([item for item in some if isinstance(item, Group)]))
                    self._add(some, [next(made) if isinstance(item, Group) else item for item in some])
                bar.update(len(some))
        why = self.skipped_file if self.skipped else None
        if not self.written:
            raise UserError(f"{self.out}: none of {len(self.skipped)} groups could be annotated; {why} says why")
        self._store(finished=True)
        return Summary(out=self.out, groups=len(self.written), skipped=len(self.skipped), why_skipped=why)

    def _has(self, item: Group | Skipped) -> bool:
        return (item.id, item.origin) in self.skipped or (isinstance(item, Group) and item.id in self.written)

    def _add(self, items: Sequence[Group | Skipped], results: Sequence[Row | Skipped]) -> None:
        new = [result for item, result in zip(items, results, strict=True) if not self._has(item)]
        rows = [row for row in new if isinstance(row, dict)]
        skipped = [item for item in new if isinstance(item, Skipped)]
        _append(self.out, rows)
        _append(self.skipped_file, map(asdict, skipped))
        self.written |= {row["id"] for row in rows}
        self.skipped |= {(item.id, item.origin) for item in skipped}

    def _compare(self, stored: Row) -> None:
        there = stored.get("settings", {})
        differing = [
            f"{name} is {self.settings.get(name)!r} here, {there.get(name)!r} there"
            for name in sorted({*there, *self.settings})
            if there.get(name) != self.settings.get(name)
        ]
        if differing:
            raise UserError(
                f"{self.out}: was begun with other settings: {'; '.join(differing)}. Choose another file, or "
                "--force to make it anew."
            )

    def _stored(self) -> Row:
        if not self.settings_file.exists():
            return {}
        try:
            stored = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.settings_file}: not valid JSON: {error}") from error
        if not isinstance(stored, dict):
            raise UserError(f"{self.settings_file}: expected an object, found {type(stored).__name__}")
        return stored

    def _store(self, *, finished: bool) -> None:
        temporary = self.settings_file.with_name(f".{self.settings_file.name}.tmp")
        text = json.dumps({"finished": finished, "settings": self.settings}, ensure_ascii=False, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self.settings_file)


def _append(file: Path, rows: Iterable[Row]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if lines:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(lines)


def _whole_lines(file: Path) -> Iterator[Row]:
    """The rows of a file; a last line in which its writer was killed is cut off."""
    if not file.exists():
        return
    with open(file, "rb+") as stream:
        stream.truncate(stream.read().rfind(b"\n") + 1)
    if file.stat().st_size:
        yield from (entry for _, _, entry in tables.json_entries(file))
