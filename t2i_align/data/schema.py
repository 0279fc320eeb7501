"""The one shape of preference data: groups of candidates for a prompt, and which column of a table holds what.

A group is one prompt with k candidates and what is known about which is better: k = 2 is a pair, k = 1 a liked
(score > 0) or disliked (score < 0) sample, k > 2 a ranking. Candidates are kept best first, ties in source order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t2i_align.errors import UserError, printable, shown, unknown
from t2i_align.utils.settings import Bool, settings

Media = bytes | Path
Values = dict[str, Any]
LEFT_OUT = b"left out"  # stands for an image where images are not wanted
Names = list[str] | str
ORDERS = ("scores", "ranks", "votes", "shares", "winner", "best_first")  # ways to say which candidate is better
MAX_REASON = 300  # characters
FLOAT32_MAX = 3.4028234663852886e38  # scores are trained on in this precision
PLAIN_SCORES = (-1.0, 0.0, 0.5, 1.0)  # labels: worse, better or equal, but not by how much


@dataclass(frozen=True)
class Column:
    """An optional column of groups.

    type: name of a value's Arrow type, such as "string" or "double"; where the column is `per_candidate`, of one
    candidate's, and where that has numbers `per_segment` of a clip, of one number. text: whether values are encoded as
    prompts are, so that a batch holds their conditioning.
    """

    name: str
    type: str = "string"
    per_candidate: bool = False
    per_segment: bool = False
    text: bool = False

    def parse(self, value: Any, key: str) -> Any:
        """A group's value as a file has it under `key`, checked and converted.

        Raises:
            ValueError: another type, a number that is not finite, or more segments for one candidate than for another;
                names the key, what is expected and the value.
        """
        if self.per_candidate and not isinstance(value, list | tuple):
            raise ValueError(f"{key!r} must be a list, found {shown(value)}")
        parsed: tuple[Any, ...] = tuple(map(self._parsed, value if self.per_candidate else [value]))
        if None in parsed:
            kind = "finite number" if self.type != "string" else "text" if self.text else "text or number"
            kind = f"lists of {kind}" if self.per_segment else kind
            expected = f"a list of {kind}s" if self.per_candidate else kind
            raise ValueError(f"{key!r} must be {expected}, found {shown(value)}")
        if self.per_segment and len({len(one) for one in parsed}) > 1:
            raise ValueError(f"{key!r} must have as many segments for each candidate, found {shown(value)}")
        return parsed if self.per_candidate else parsed[0]

    def texts(self, value: Any) -> Sequence[str]:
        """The texts of a group's value that are encoded."""
        if value is None or not self.text:
            return ()
        return value if self.per_candidate else (value,)

    def take(self, value: Any, places: Sequence[int]) -> Any:
        """A group's value for some of its candidates."""
        return tuple(value[place] for place in places) if self.per_candidate else value

    def _parsed(self, value: Any) -> str | float | tuple[float, ...] | None:
        if self.per_segment:
            row = [finite(one) for one in value] if isinstance(value, list | tuple) else []
            return None if None in row else tuple(row) or None  # type: ignore[arg-type]
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if self.type == "string":
            return str(value) if isinstance(value, str) or (numeric and not self.text) else None
        return finite(value) if numeric else None


def finite(value: Any) -> float | None:
    """A number, or a text that is one, as a float; None for anything else and for what exceeds single precision."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= FLOAT32_MAX else None


ID = Column("id")
SCORES = Column("scores", "double", per_candidate=True)
# The optional columns. Readers, annotations, the store and the loader go by this table.
COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("captions", per_candidate=True, text=True),  # a caption of each candidate's own
        Column("negative_caption", text=True),  # does not fit the best candidate
        Column("user"),  # whose preference it is
        Column("segment_scores", "double", per_candidate=True, per_segment=True),  # of each candidate's stretches of
        Column("segment_seconds", "double"),  # so many seconds; the last may be shorter
    )
}


class WithColumns:
    """Optional columns as attributes; None where there is no value."""

    columns: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in COLUMNS:
            return vars(self)["columns"].get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class Group(WithColumns):
    """One prompt with k candidates.

    `id` is unique and stable within a source (randomness is keyed by it); `origin` names the file and row for
    messages. `scores` has one number per candidate, higher is better, equal is a tie. `columns` has the optional
    columns that this group has (see COLUMNS); `group.user` is short for `group.columns.get("user")`.
    """

    id: str
    prompt: str
    candidates: tuple[Media, ...]
    scores: tuple[float, ...]
    origin: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k = len(self.candidates)
        if k == 0:
            raise ValueError(f"{self.origin}: a group needs at least one candidate")
        for name, value in {"scores": self.scores, **self.columns}.items():
            if (name == "scores" or COLUMNS[name].per_candidate) and len(value) != k:
                raise ValueError(f"{self.origin}: {k} candidates, but {len(value)} {name}")
        if not all(abs(score) <= FLOAT32_MAX for score in self.scores):
            raise ValueError(f"{self.origin}: scores must be finite numbers, found {shown(list(self.scores))}")
        single = tuple(np.array(self.scores, np.float32).tolist())
        if len({*single}) < len({*self.scores}) or single.count(0) > self.scores.count(0):
            object.__setattr__(self, "scores", single)  # scores that training cannot tell apart are equal
        object.__setattr__(self, "origin", printable(self.origin))  # it has names of files and keys from anywhere

    def __repr__(self) -> str:
        shown = [f"{len(media)} bytes" if isinstance(media, bytes) else str(media) for media in self.candidates]
        return f"Group({self.id!r}, {self.prompt!r}, {', '.join(shown)}, scores={self.scores})"

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts for the encoder: the prompt, then those of the columns."""
        return (self.prompt, *(text for name in COLUMNS for text in COLUMNS[name].texts(self.columns.get(name))))

    @property
    def is_tie(self) -> bool:
        """Whether it has several candidates and prefers none of them."""
        return len(self.scores) > 1 and max(self.scores) == min(self.scores)

    @property
    def is_disliked(self) -> bool:
        """Whether it is a single sample that was not liked."""
        return len(self.scores) == 1 and self.scores[0] <= 0

    @property
    def present(self) -> list[str]:
        """The columns an objective may require that it has: `scores` where they are more than labels, and COLUMNS."""
        graded = any(score not in PLAIN_SCORES for score in self.scores)
        return [*(["scores"] if graded else []), *(name for name in COLUMNS if name in self.columns)]

    def take(self, places: Sequence[int]) -> Group:
        """The group with the candidates at these places, in this order."""
        return replace(
            self,
            candidates=tuple(self.candidates[place] for place in places),
            scores=tuple(self.scores[place] for place in places),
            columns={name: COLUMNS[name].take(value, places) for name, value in self.columns.items()},
        )

    def skipped(self, reason: str) -> Skipped:
        """The record of a group that is not used."""
        return Skipped(id=self.id, origin=self.origin, reason=reason)

    def best_first(self) -> Group:
        """The same group with its candidates in descending order of score; ties keep their order."""
        return self.take(sorted(range(len(self.scores)), key=lambda place: -self.scores[place]))


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that could not be used, and why. Written to the manifest; never dropped in silence."""

    id: str
    origin: str
    reason: str

    def __post_init__(self) -> None:
        reason = printable(self.reason)
        reason = reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 2]} …"
        object.__setattr__(self, "origin", printable(self.origin))
        object.__setattr__(self, "reason", reason)


class Row(NamedTuple):
    """A row of a table: its place as an id, what to call it in messages, its values by column."""

    id: str
    origin: str
    values: Values

    def skipped(self, reason: str) -> Skipped:
        """The record of a row that cannot be used."""
        return Skipped(id=self.id, origin=self.origin, reason=reason)


Items = Iterator[Group | Skipped]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which groups an objective learns from, and how many of them are wanted (None: all)."""

    candidates: int = 1
    ties: bool = True
    likes_only: bool = False
    limit: int | None = None

    def accepts(self, group: Group) -> bool:
        """Whether the objective learns from a group."""
        if self.likes_only and group.is_disliked:
            return False
        return len(group.candidates) >= self.candidates and (self.ties or not group.is_tie)

    def first(self, items: Items, accepted: int = 0) -> Items:
        """The items up to the group with which the limit is reached, none beyond; `accepted` groups came before."""
        while accepted != self.limit and (item := next(items, None)) is not None:
            accepted += isinstance(item, Group) and self.accepts(item)
            yield item


EVERYTHING = Selection()


@dataclass
class Counts:
    """How many groups there are, of a source or of prepared data.

    candidates: by their k. ties: of these, those whose best and worst score are equal. disliked: single samples that
    were not liked. columns: those that have each column (see `Group.present`).
    """

    candidates: Counter[int] = field(default_factory=Counter)
    ties: Counter[int] = field(default_factory=Counter)
    disliked: int = 0
    columns: Counter[str] = field(default_factory=Counter)

    @property
    def groups(self) -> int:
        return self.candidates.total()


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
