"""Which column of a table holds what, and the groups that its rows make.

Columns(candidates=["left", "right"], votes=["votes_left", "votes_right"], prompt="text")
Columns(candidates="image_path", ranks="rank", group="prompt_id")
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.data import tables
from t2i_align.data.formats import exists, inside
from t2i_align.data.schema import Group, Items, Media, Skipped
from t2i_align.data.tables import Row
from t2i_align.errors import UserError
from t2i_align.labeling.votes import majority
from t2i_align.utils.settings import Bool, settings

ORDERS = ("scores", "ranks", "votes", "winner", "best_first")
TIE = ("tie", "draw", "equal", "both", "same", "0.5")
Names = list[str] | str


class _Unusable(ValueError):
    """Why a row cannot be used."""


@settings
class Columns:
    """Column names. A list of names has one per candidate; a single name is of a column that holds a list.

    candidates: images or clips: their bytes, or paths in `folder`, which is relative to the table's own.
    Exactly one of these says which is better:
        scores: numbers, higher is better.
        ranks: numbers, 1 is the best. They become the share of the other candidates that one beats, ties counting half.
        votes: how many voted for each; they become shares of all votes.
        winner: the name of a candidate's column, its place from 0, its own value, or `tie`.
        best_first: true where candidates are listed in that order.
    group: rows with the same value here are one group, with one candidate a row and no lists.
    """

    candidates: Names
    prompt: str = "prompt"
    scores: Names | None = None
    ranks: Names | None = None
    votes: Names | None = None
    winner: str | None = None
    best_first: Bool = False
    captions: Names | None = None
    negative_caption: str | None = None
    user: str | None = None
    id: str | None = None
    group: str | None = None
    folder: str = "."

    def __post_init__(self) -> None:
        given = [name for name in ORDERS if getattr(self, name)]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise UserError(f"columns: exactly one of {', '.join(ORDERS)} says which is better; found {found}")
        for name in ("scores", "ranks", "votes", "captions"):
            value = getattr(self, name)
            if isinstance(value, list) and (
                not isinstance(self.candidates, list) or len(value) != len(self.candidates)
            ):
                raise UserError(f"columns: {name} names {len(value)} columns, candidates {self.candidates!r}")
        if self.group and (isinstance(self.candidates, list) or given[0] not in ("scores", "ranks", "votes")):
            raise UserError("columns: with group, candidates is one column and scores, ranks or votes another")

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        out: dict[str, None] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "folder" and value and value is not True:
                out.update(dict.fromkeys(value if isinstance(value, list) else [value]))
        return list(out)

    @property
    def needed(self) -> list[str]:
        """Those without which there are no groups."""
        optional = {self.user, self.id, self.negative_caption}
        return [name for name in self.names if name not in optional]


def read(path: Path, columns: Columns, *, images: bool = True) -> Items:
    """The groups of a table. Rows that cannot be used are skipped, each with its reason.

    Raises:
        UserError: before anything is read: a column that is missing; while reading: a path outside of its folder, a
            table that is broken as a whole.
    """
    for file in tables.files(path):
        found = tables.columns(file)
        if missing := [name for name in columns.needed if found and name not in found]:
            raise UserError(
                f"{file}: column {missing[0]!r} is missing. Columns found: {', '.join(found)}. A source file can say "
                "which column holds what (docs/data.md)."
            )
    rows = tables.rows(path, columns.names, images=images)
    root = (path if path.is_dir() else path.parent) / columns.folder
    if columns.group:
        yield from _grouped(rows, columns, root)
        return
    for row in rows:
        yield row if isinstance(row, Skipped) else group_of(row, [row], columns, root)


def files(path: Path, columns: Columns) -> list[Path]:
    """The table's files and the images that they name."""
    groups = (item for item in read(path, columns, images=False) if isinstance(item, Group))
    media = dict.fromkeys(media for group in groups for media in group.candidates if isinstance(media, Path))
    return [*tables.files(path), *media]


def _grouped(rows: Iterator[Row | Skipped], columns: Columns, root: Path) -> Items:
    """Rows of one group need not follow each other, so all are held in memory, their images being paths."""
    assert columns.group is not None
    found: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row, Skipped):
            yield row
        elif (value := row.values.get(columns.group)) in (None, ""):
            yield Skipped(id=row.id, origin=row.origin, reason=f"no {columns.group!r}")
        elif isinstance(row.values.get(str(columns.candidates)), bytes | dict):
            raise UserError(f"{row.origin}: with a group column, images must be paths, not part of the table")
        else:
            found.setdefault(str(value), []).append(row)
    for value, members in found.items():
        prompts = [member.values.get(columns.prompt) for member in members]
        if any(prompt != prompts[0] for prompt in prompts):
            reason = f"its {len(members)} rows have different prompts"
            yield Skipped(id=value, origin=members[0].origin, reason=reason)
        else:
            yield group_of(Row(value, members[0].origin, members[0].values), members, columns, root)


def group_of(row: Row, members: Sequence[Row], columns: Columns, root: Path) -> Group | Skipped:
    """The group of a row, or of `members` with one candidate each.

    Raises:
        UserError: a path that leads out of `root`.
    """
    name = row.id
    try:
        if columns.id and row.values.get(columns.id) is not None:
            name = _text(row, columns.id)
        values = _values(members, columns.candidates)
        scores = _scores(members, columns, values)
        user = None if columns.user is None or row.values.get(columns.user) is None else _text(row, columns.user)
        negative = columns.negative_caption
        return Group(
            id=name,
            prompt=_text(row, columns.prompt, only=str),
            candidates=tuple(_media(value, root, row.origin) for value in values),
            scores=scores,
            origin=row.origin,
            columns={
                "captions": _captions(members, columns, len(values)),
                "negative_caption": _text(row, negative, only=str) if negative and row.values.get(negative) else None,
                "user": user,
            },
        )
    except _Unusable as error:
        return Skipped(id=name, origin=row.origin, reason=str(error))


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
            raise _Unusable(f"{names!r} is not a list: {error}") from error
    return value if isinstance(value, list) else [value]


def _scores(members: Sequence[Row], columns: Columns, candidates: list[Any]) -> tuple[float, ...]:
    k = len(candidates)
    if k == 0:
        raise _Unusable("no candidates")
    if columns.best_first:
        return tuple((k - 1 - place) / (k - 1) if k > 1 else 1.0 for place in range(k))
    if columns.winner is not None:
        return _won(members[0], columns.winner, columns.candidates, candidates)
    kind = next(name for name in ("scores", "ranks", "votes") if getattr(columns, name))
    values = _values(members, getattr(columns, kind))
    if len(values) != k:
        raise _Unusable(f"{k} candidates, but {len(values)} {kind}")
    numbers = [_number(value, kind) for value in values]
    if kind == "ranks" and k > 1:
        numbers = majority(-np.array([numbers])).tolist()
    elif kind == "votes":
        if min(numbers) < 0 or sum(numbers) == 0:
            raise _Unusable(f"votes must not be negative, nor all of them 0; found {values}")
        numbers = [number / sum(numbers) for number in numbers]
    return tuple(numbers)


def _won(row: Row, name: str, columns: Names, candidates: list[Any]) -> tuple[float, ...]:
    value = row.values.get(name)
    said = str(value).strip()
    if said.lower() in TIE:
        return (0.5,) * len(candidates)
    known = columns if isinstance(columns, list) else []
    for place, candidate in enumerate(candidates):
        if said in (*known[place : place + 1], str(place)) or (isinstance(candidate, str) and said == candidate):
            return tuple(float(other == place) for other in range(len(candidates)))
    places = " or ".join([*known, f"0 to {len(candidates) - 1}", TIE[0]])
    raise _Unusable(f"{name!r} must be {places}, found {value!r}")


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _Unusable(f"{what} must be finite numbers, found {value!r}")
    return number


def _captions(members: Sequence[Row], columns: Columns, k: int) -> tuple[str, ...] | None:
    if columns.captions is None:
        return None
    values = _values(members, columns.captions)
    if len(values) != k or not all(isinstance(value, str) for value in values):
        raise _Unusable(f"expected one caption for each of {k} candidates, found {values}")
    return tuple(values)


def _text(row: Row, name: str, only: type = object) -> str:
    value = row.values.get(name)
    if value is None:
        raise _Unusable(f"no {name!r}")
    if not isinstance(value, only) or not isinstance(value, str | int | float):
        raise _Unusable(f"{name!r} must be text, found {value!r}")
    return str(value)


def _media(value: Any, root: Path, origin: str) -> Media:
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys():  # the Image feature of `datasets`
        value = value.get("bytes") or value.get("path")
    if not value:
        raise _Unusable("an image is missing")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _Unusable(f"expected an image or its path, found {value!r}")
    path = inside(root, value, origin)
    if not exists(path):
        raise _Unusable(f"no such image: {value}")
    return path
