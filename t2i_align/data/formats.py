"""What the readers of all formats share: paths that stay inside their root, and the survey of a source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from t2i_align.data.schema import Group, Skipped
from t2i_align.errors import UserError

Items = Iterator[Group | Skipped]
REASONS_SHOWN = 3
COLUMNS = ("scores", "captions", "negative_caption", "user")  # what an objective may ask for, and annotations may add
LABELS = (-1.0, 0.0, 0.5, 1.0)  # scores that say better, worse, equal and no more


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source holds, found without opening its images.

    rows: items of any kind. candidates: number of groups by their k. ties: those of them whose best and worst score
    are equal. disliked: single samples that were not liked. texts: distinct prompts and captions. columns: how many
    groups have each of COLUMNS. reasons: the first skips'.
    """

    rows: int
    candidates: dict[int, int]
    ties: dict[int, int]
    disliked: int
    texts: int
    columns: dict[str, int]
    reasons: tuple[str, ...]

    @property
    def groups(self) -> int:
        return sum(self.candidates.values())

    @property
    def texts_per_group(self) -> int:
        """How many texts are encoded of a group at most: its prompt, and where there are any, its captions."""
        captions = max(self.candidates) if self.columns.get("captions") else 0
        return 1 + captions + bool(self.columns.get("negative_caption"))

    @classmethod
    def of(cls, items: Iterable[Group | Skipped]) -> Survey:
        rows = disliked = 0
        candidates: Counter[int] = Counter()
        ties: Counter[int] = Counter()
        columns: Counter[str] = Counter()
        texts: set[str] = set()
        reasons: list[str] = []
        for item in items:
            rows += 1
            if isinstance(item, Skipped):
                if len(reasons) < REASONS_SHOWN:
                    reasons.append(f"{item.origin}: {item.reason}")
                continue
            candidates[len(item.candidates)] += 1
            if is_tie(item.scores):
                ties[len(item.candidates)] += 1
            disliked += is_disliked(item.scores)
            texts.update(item.texts)
            columns.update(present_columns(item))
        return cls(
            rows=rows,
            candidates=dict(candidates),
            ties=dict(ties),
            disliked=disliked,
            texts=len(texts),
            columns=dict(columns),
            reasons=tuple(reasons),
        )


def is_tie(scores: tuple[float, ...]) -> bool:
    """Whether a group with several candidates prefers none of them."""
    return len(scores) > 1 and max(scores) == min(scores)


def is_disliked(scores: tuple[float, ...]) -> bool:
    """Whether a group is a single sample that was not liked."""
    return len(scores) == 1 and scores[0] <= 0


def present_columns(group: Group) -> list[str]:
    """Which of COLUMNS this group has; scores count where they are more than labels."""
    graded = any(score not in LABELS for score in group.scores)
    return [name for name in COLUMNS if (graded if name == "scores" else getattr(group, name) is not None)]


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
