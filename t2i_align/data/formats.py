"""What the readers of all formats share: paths that stay inside their root, and the survey of a source."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from t2i_align.data.schema import COLUMNS, Group, Items, Skipped
from t2i_align.errors import UserError

REASONS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source holds, found without opening its images.

    rows: items of any kind. candidates: number of groups by their k. ties: those of them whose best and worst score
    are equal. disliked: single samples that were not liked. accepted, score_range: number of groups that a selection
    accepts, and their least and greatest score. texts: distinct prompts and captions. columns: how many groups have
    each column (see `Group.present`). reasons: the first skips'.
    """

    rows: int
    candidates: dict[int, int]
    ties: dict[int, int]
    disliked: int
    accepted: int
    score_range: tuple[float, float]
    texts: int
    columns: dict[str, int]
    reasons: tuple[str, ...]

    @property
    def groups(self) -> int:
        return sum(self.candidates.values())

    @property
    def texts_per_group(self) -> int:
        """How many texts are encoded of a group at most: its prompt, and where there are any, its captions."""
        texts = [column for column in COLUMNS.values() if column.text and self.columns.get(column.name)]
        return 1 + sum(max(self.candidates) if column.per_candidate else 1 for column in texts)

    @classmethod
    def of(cls, items: Iterable[Group | Skipped], selection: Selection | None = None) -> Survey:
        selection = selection or EVERYTHING
        rows = disliked = accepted = 0
        least, greatest = math.inf, -math.inf
        candidates: Counter[int] = Counter()
        ties: Counter[int] = Counter()
        columns: Counter[str] = Counter()
        texts: set[str] = set()
        reasons: list[str] = []
        for item in selection.first(items):
            rows += 1
            if isinstance(item, Skipped):
                if len(reasons) < REASONS_SHOWN:
                    reasons.append(f"{item.origin}: {item.reason}")
                continue
            candidates[len(item.candidates)] += 1
            if item.is_tie:
                ties[len(item.candidates)] += 1
            disliked += item.is_disliked
            if selection.accepts(item):
                accepted += 1
                least, greatest = min(least, *item.scores), max(greatest, *item.scores)
            texts.update(item.texts)
            columns.update(item.present)
        return cls(
            rows=rows,
            candidates=dict(candidates),
            ties=dict(ties),
            disliked=disliked,
            accepted=accepted,
            score_range=(least, greatest),
            texts=len(texts),
            columns=dict(columns),
            reasons=tuple(reasons),
        )


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

    def first(self, items: Iterable[Group | Skipped], accepted: int = 0) -> Items:
        """The items up to the one with which the limit is reached; `accepted` groups came before."""
        for item in items:
            yield item
            accepted += isinstance(item, Group) and self.accepts(item)
            if accepted == self.limit:
                return


EVERYTHING = Selection()


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
