"""From rows to groups, by column maps: the one place where what makes a row unusable becomes a recorded skip."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from t2i_align.data import tables
from t2i_align.data.layouts import Columns, Names
from t2i_align.data.schema import COLUMNS, ID, Group, Items, Media, Skipped
from t2i_align.data.tables import Row
from t2i_align.data.votes import majority
from t2i_align.errors import UserError

TIE = ("tie", "draw", "equal", "both", "same", "0.5")
SHARES_TOLERANCE = 1e-3


def read(path: Path, maps: Sequence[Columns], *, images: bool = True) -> Items:
    """The groups of a table, each row read by the first map whose columns it has.

    Raises:
        UserError: at once, where a file with a fixed schema lacks a column; while reading, a file that is broken as a
            whole, or a path that leads out of the folder.
    """
    for file in tables.files(path):
        names = tables.columns(file)
        if file.suffix in (*tables.CSV, ".parquet") and all(columns.missing(names) for columns in maps):
            missing = min((columns.missing(names) for columns in maps), key=len)
            raise UserError(
                f"{file}: column {missing[0]!r} is missing. Columns found: {', '.join(names) or 'none'}. A dataset "
                "spec can say which column holds what (docs/data.md)."
            )
    maps = [replace(columns, id=None) if not _has_ids(path, columns) else columns for columns in maps]
    return _groups(path, maps, images)


def _groups(path: Path, maps: Sequence[Columns], images: bool) -> Items:
    names = [*dict.fromkeys(name for columns in maps for name in columns.names)]
    rows = tables.rows(path, names, images=images)
    folder = path if path.is_dir() else path.parent
    if maps[0].group:
        yield from _gathered(rows, maps[0], folder / maps[0].folder)
        return
    required = [(columns, {*columns.required}) for columns in maps]
    for row in rows:
        if isinstance(row, Skipped):
            yield row
        elif columns := next((columns for columns, needed in required if needed <= row.values.keys()), None):
            yield group_of(row, [row], columns, folder / columns.folder)
        else:
            expected = " or ".join(", ".join(columns.required) for columns in maps)
            keys = ", ".join(map(repr, row.values)) or "none"
            yield Skipped(id=row.id, origin=row.origin, reason=f"expected the keys {expected}; found {keys}")


def _gathered(rows: Iterator[Row | Skipped], columns: Columns, root: Path) -> Items:
    """Rows of one group need not follow each other, so all are held in memory, their images being paths."""
    assert columns.group is not None
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row, Skipped):
            yield row
        elif (value := row.values.get(columns.group)) in (None, ""):
            yield Skipped(id=row.id, origin=row.origin, reason=f"no {columns.group!r}")
        elif isinstance(row.values.get(str(columns.candidates)), bytes | dict):
            raise UserError(f"{row.origin}: with a group column, images must be paths, not part of the table")
        else:
            groups.setdefault(str(value), []).append(row)
    for value, members in groups.items():
        prompts = [member.values.get(str(columns.prompt)) for member in members]
        if any(prompt != prompts[0] for prompt in prompts):
            reason = f"its {len(members)} rows have different prompts"
            yield Skipped(id=value, origin=members[0].origin, reason=reason)
        else:
            yield group_of(Row(value, members[0].origin, members[0].values), members, columns, root)


def _has_ids(path: Path, columns: Columns) -> bool:
    """Whether a table's ids can be used as they are."""
    if not columns.id or not columns.id_if_unique:
        return True
    files = tables.files(path)
    if not all(file.suffix == ".parquet" and columns.id in tables.columns(file) for file in files):
        return False
    parts = [tables.parquet_column(file, columns.id).cast(pa.string()) for file in files]
    ids = pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
    return ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids)


def group_of(row: Row, members: Sequence[Row], columns: Columns, root: Path) -> Group | Skipped:
    """The group of a row, or of `members` with one candidate each; what makes it unusable becomes a `Skipped` here.

    Raises:
        UserError: a path that leads out of `root`.
    """
    name = row.id
    try:
        if columns.id and row.values.get(columns.id) is not None:
            name = ID.parse(row.values[columns.id], columns.id)
        if columns.judged and row.values.get(columns.judged) in (False, 0):
            raise ValueError(f"not labelled ({columns.judged} is false)")
        values = _values(members, columns.candidates)
        scores = _scores(members, columns, values)
        optional = dict(_optional(members, columns))
        return Group(
            id=name,
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
            raise ValueError(f"{names!r} is not a list: {error}") from error
    return value if isinstance(value, list) else [value]


def _scores(members: Sequence[Row], columns: Columns, candidates: list[Any]) -> tuple[float, ...]:
    k = len(candidates)
    if k == 0:
        raise ValueError("no candidates")
    if columns.best_first:
        return tuple((k - 1 - place) / (k - 1) if k > 1 else 1.0 for place in range(k))
    if columns.winner is not None:
        return _won(members[0], columns.winner, columns.candidates, candidates)
    names: Names = getattr(columns, columns.order)
    values = _values(members, names)
    if len(values) != k:
        raise ValueError(f"{k} candidates, but {len(values)} {columns.order}")
    numbers = [_number(value, _key(names, place)) for place, value in enumerate(values)]
    if columns.order == "ranks" and k > 1:
        numbers = majority(-np.array([numbers])).tolist()
    elif columns.order == "votes":
        if min(numbers) < 0 or sum(numbers) == 0:
            raise ValueError(f"votes must not be negative, nor all of them 0; found {values}")
        numbers = [number / sum(numbers) for number in numbers]
    elif columns.order == "shares" and (min(numbers) < 0 or abs(sum(numbers) - 1) > SHARES_TOLERANCE):
        keys = " and ".join(_key(names, place) for place in range(k))
        raise ValueError(f"{keys} must lie in [0, 1] and add up to 1, found {' and '.join(map(str, numbers))}")
    return tuple(numbers)


def _won(row: Row, name: str, names: Names, candidates: list[Any]) -> tuple[float, ...]:
    winner = str(row.values.get(name)).strip()
    if winner.lower() in TIE:
        return (0.5,) * len(candidates)
    columns = names if isinstance(names, list) else []
    for place, candidate in enumerate(candidates):
        own_path = isinstance(candidate, str) and winner == candidate
        if own_path or winner in (*columns[place : place + 1], str(place)):
            return tuple(float(other == place) for other in range(len(candidates)))
    expected = " or ".join([*columns, f"0 to {len(candidates) - 1}", TIE[0]])
    raise ValueError(f"{name!r} must be {expected}, found {row.values.get(name)!r}")


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
        raise ValueError(f"{columns.prompt!r} must be text, found {value!r}")
    return value


def _number(value: Any, key: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} must be a finite number, found {value!r}")
    return number


def _key(names: Names, place: int) -> str:
    """How messages name a candidate's value."""
    return repr(names[place]) if isinstance(names, list) else f"{names!r} [{place}]"


def _media(value: Any, key: str, root: Path, origin: str) -> Media:
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys():  # the Image feature of `datasets`
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ValueError(f"{key}: an image is missing")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected an image or its path, found {value!r}")
    path = inside(root, value, origin)
    if not exists(path):
        raise ValueError(f"no such image: {value}")
    return path


def exists(path: Path) -> bool:
    """Whether something is there; `Path.exists` raises where a name is too long to be one."""
    return os.path.exists(path)


def inside(root: Path, name: str, origin: str) -> Path:
    """The image or clip `name`, relative to `root`, as an absolute path.

    Raises:
        UserError: the path leaves `root` (absolute, through `..`, or through a symbolic link), or is no path at all.
    """
    try:
        base = root.resolve()
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a symlink loop, a null byte
        raise UserError(f"{origin}: {name!r} is not a usable path: {error}") from error
    if not path.is_relative_to(base):
        raise UserError(f"{origin}: {name!r} leads outside {base}; images must lie in that folder")
    return path
