"""From rows to groups, by column maps such as these:

    Columns(candidates=["left", "right"], votes=["votes_left", "votes_right"], prompt="text")
    Columns(candidates="image_path", ranks="rank", group="prompt_id")

What makes a row unusable becomes a recorded skip here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from t2i_align.data import tables
from t2i_align.data.schema import COLUMNS, ID, Group, Items, Row, Skipped, finite
from t2i_align.data.shards import TRAIN
from t2i_align.data.votes import majority
from t2i_align.errors import UserError, shown, unknown
from t2i_align.utils.settings import Bool, settings

ORDERS = ("scores", "ranks", "votes", "shares", "winner", "best_first")
Names = list[str] | str
TIE = ("tie", "draw", "equal", "both", "same", "0.5")
NEITHER = ("neither", "both bad", "both_bad")  # a tie as well, between images that are both disliked
SHARES_TOLERANCE = 1e-3


@settings
class Columns:
    """Column names. A list of names has one per candidate; a single name is of a column that holds a list.

    candidates: images or clips: their bytes, or paths in `folder`, which is relative to the table's own.
    prompt: where a row has none, the caption of its best candidate stands in; None: always.
    Exactly one of these says which is better:
        scores: numbers, higher is better.
        ranks: numbers, 1 is the best. They become the share of the other candidates that one beats, ties counting half.
        votes: how many voted for each; they become shares of all votes.
        shares: of votes, which add up to 1.
        winner: the name of a candidate's column, its place from 0, its own value, `tie` or `neither`.
        best_first: true where candidates are listed in that order.
    judged: a column that is false for rows without a judgement.
    id: unique per row; with `id_if_unique`, only where all rows of the table differ in it.
    group: rows with the same value here are one group, with one candidate a row and no lists.
    columns: where optional columns are found, by their names in `schema.COLUMNS`; with `own_names`, all others are
        looked for under these names.
    """

    candidates: Names
    prompt: str | None = "prompt"
    scores: Names | None = None
    ranks: Names | None = None
    votes: Names | None = None
    shares: Names | None = None
    winner: str | None = None
    best_first: Bool = False
    judged: str | None = None
    id: str | None = None
    id_if_unique: Bool = False
    group: str | None = None
    folder: str = "."
    columns: dict[str, Names] = field(default_factory=dict)
    own_names: Bool = False

    def __post_init__(self) -> None:
        given = [name for name in ORDERS if getattr(self, name)]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise UserError(f"columns: exactly one of {', '.join(ORDERS)} says which is better; found {found}")
        if unknown_names := self.columns.keys() - COLUMNS.keys():
            raise unknown("column", min(unknown_names), COLUMNS)
        if not self.prompt and "captions" not in self.columns:
            raise UserError("columns: prompt names no column, and there are no captions that could stand in for it")
        per_candidate = {name: getattr(self, name) for name in ORDERS[:4]}
        per_candidate |= {name: value for name, value in self.columns.items() if COLUMNS[name].per_candidate}
        for name, value in per_candidate.items():
            alike = isinstance(self.candidates, list) and isinstance(value, list)
            if isinstance(value, list) and not (alike and len(value) == len(self.candidates)):
                raise UserError(f"columns: {name} names {len(value)} columns, candidates {self.candidates!r}")
        if self.group and (isinstance(self.candidates, list) or given[0] not in ORDERS[:4]):
            raise UserError("columns: with group, candidates is one column and scores, ranks or votes another")

    @property
    def order(self) -> str:
        """Which of ORDERS is given."""
        return next(name for name in ORDERS if getattr(self, name))

    @property
    def required(self) -> list[str]:
        """The columns without which there are no groups."""
        better = None if self.best_first else getattr(self, self.order)
        return _flat(self.candidates, better, self.prompt or self.columns["captions"], self.group)

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        return [*dict.fromkeys([*self.required, *_flat(self.judged, self.id, *self.optional.values())])]

    @property
    def optional(self) -> Mapping[str, Names]:
        """Where each optional column is looked for."""
        return {**{name: name for name in COLUMNS if self.own_names}, **self.columns}

    def missing(self, names: Sequence[str]) -> list[str]:
        """The required columns that are not among `names`."""
        return [name for name in self.required if name not in names]


def _flat(*names: Names | None) -> list[str]:
    return [one for name in names if name for one in (name if isinstance(name, list) else [name])]


def read(
    path: Path, maps: Sequence[Columns], images: bool = True, part: Path | None = None, split: str = TRAIN
) -> Items:
    """The groups of a table, or of one of its files, each row read by the first map whose columns it has.

    Raises:
        UserError: at once, where a file with a fixed schema lacks a column; while reading, a file that is broken as a
            whole, or a path that leads out of the folder.
    """
    files = tables.files(path, split)
    for file in [part] if part else files:
        if tables.kind(file) not in tables.WITH_HEADER:
            continue
        names = tables.columns(file)
        if all(columns.missing(names) for columns in maps):
            missing = min((columns.missing(names) for columns in maps), key=len)
            raise UserError(
                f"{file}: column {missing[0]!r} is missing. Columns found: {', '.join(names) or 'none'}. A dataset "
                "spec can say which column holds what (docs/data.md)."
            )
    maps = [replace(columns, id=None) if not _has_ids(files, columns) else columns for columns in maps]
    needed = [*dict.fromkeys(name for columns in maps for name in columns.names)]
    rows = tables.rows(path, needed, images=images, part=part, split=split)
    return _groups(rows, maps, path if path.is_dir() else path.parent)


def _groups(rows: Iterator[Row | Skipped], maps: Sequence[Columns], folder: Path) -> Items:
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
            expected = ", or ".join(" and ".join(columns.required) for columns in maps[:3])  # others are synonyms
            keys = ", ".join(map(repr, row.values)) or "none"
            yield row.skipped(f"expected the keys {expected}; found {keys}")


def _gathered(rows: Iterator[Row | Skipped], columns: Columns, root: Path) -> Items:
    """Rows of one group need not follow each other, so all are held in memory, their images being paths."""
    assert columns.group is not None
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row, Skipped):
            yield row
        elif (value := row.values.get(columns.group)) in (None, ""):
            yield row.skipped(f"no {columns.group!r}")
        elif isinstance(row.values.get(str(columns.candidates)), bytes | dict):
            raise UserError(f"{row.origin}: with a group column, images must be paths, not part of the table")
        else:
            groups.setdefault(str(value), []).append(row)
    for value, members in groups.items():
        row = members[0]._replace(id=value)
        prompts = [member.values.get(str(columns.prompt)) for member in members]
        if any(prompt != prompts[0] for prompt in prompts):
            yield row.skipped(f"its {len(members)} rows have different prompts")
        else:
            yield group_of(row, members, columns, root)


def _has_ids(files: Sequence[Path], columns: Columns) -> bool:
    """Whether a table's ids can be used as they are."""
    if not columns.id or not columns.id_if_unique:
        return True
    return _unique(columns.id, *((file, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)  # asked again for each file of a stream
def _unique(name: str, *files: tuple[Path, int]) -> bool:
    if not all(tables.kind(file) == ".parquet" and name in tables.columns(file) for file, _ in files):
        return False
    parts = [tables.parquet_column(file, name).cast(pa.string()) for file, _ in files]
    ids = pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
    return ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids)


def group_of(row: Row, members: Sequence[Row], columns: Columns, root: Path) -> Group | Skipped:
    """The group of a row, or of `members` with one candidate each; what makes it unusable becomes a `Skipped` here.

    Raises:
        UserError: a path that leads out of `root`.
    """
    try:
        if columns.id and row.values.get(columns.id) is not None:
            row = row._replace(id=ID.parse(row.values[columns.id], columns.id))
        if columns.judged and row.values.get(columns.judged) in (False, 0):
            raise ValueError(f"not labelled ({columns.judged} is false)")
        values = _values(members, columns.candidates)
        scores = _scores(members, columns, values)
        optional = dict(_optional(members, columns))
        return Group(
            id=row.id,
            prompt=_prompt(row, columns, scores, optional.get("captions")),
            candidates=tuple(
                tables.media_of(value, _key(columns.candidates, place), root, row.origin)
                for place, value in enumerate(values)
            ),
            scores=scores,
            origin=row.origin,
            columns=optional,
        )
    except UserError:
        raise
    except ValueError as error:
        return row.skipped(str(error).removeprefix(f"{row.origin}: "))


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
            raise ValueError(f"votes must not be negative, nor all of them 0; found {shown(values)}")
        numbers = [number / sum(numbers) for number in numbers]
    elif columns.order == "shares" and (min(numbers) < 0 or abs(sum(numbers) - 1) > SHARES_TOLERANCE):
        keys = " and ".join(_key(names, place) for place in range(k))
        raise ValueError(f"{keys} must lie in [0, 1] and add up to 1, found {' and '.join(map(str, numbers))}")
    return tuple(numbers)


def _won(row: Row, name: str, names: Names, candidates: list[Any]) -> tuple[float, ...]:
    """The winner is 1, the others 0.

    Raises:
        ValueError: none of them.
        UserError: a place that only counting from 1 gives, which would turn all other rows round.
    """
    value = row.values.get(name)
    winner = str(value).strip()
    if winner.lower() in TIE:
        return (0.5,) * len(candidates)
    if winner.lower() in NEITHER:
        return (0.0,) * len(candidates)
    columns = names if isinstance(names, list) else []
    number = None if isinstance(value, bool) else finite(value)
    for place, candidate in enumerate(candidates):
        own_path = isinstance(candidate, str) and winner == candidate
        if own_path or winner in columns[place : place + 1] or number == place:
            return tuple(float(other == place) for other in range(len(candidates)))
    if number == len(candidates):
        raise UserError(
            f"{row.origin}: {name!r} is {winner}, but places count from 0 to {len(candidates) - 1}. If this source "
            "counts from 1, subtract 1, or name columns or paths."
        )
    expected = " or ".join([*columns, f"0 to {len(candidates) - 1}", TIE[0], NEITHER[0]])
    raise ValueError(f"{name!r} must be {expected}, found {shown(value)}")


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
        raise ValueError(f"{columns.prompt!r} must be text, found {shown(value)}")
    return value


def _number(value: Any, key: str) -> float:
    if (number := finite(value)) is None:
        raise ValueError(f"{key} must be a finite number, found {shown(value)}")
    return number


def _key(names: Names, place: int) -> str:
    """How messages name a candidate's value."""
    return repr(names[place]) if isinstance(names, list) else f"{names!r} [{place}]"
