"""What the readers of all formats share: paths that stay inside their root, and the survey of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from t2i_align.data.schema import Group, Skipped
from t2i_align.errors import UserError

Items = Iterator[Group | Skipped]
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
REASONS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source holds, found without opening its pictures.

    rows: items of any kind. candidates: number of groups by their k. ties: those of them whose best and worst score
    are equal. disliked: single samples that were not liked. prompts: distinct ones. columns: how many groups have each
    optional column. reasons: the first skips'.
    """

    rows: int
    candidates: dict[int, int]
    ties: dict[int, int]
    disliked: int
    prompts: int
    columns: dict[str, int]
    reasons: tuple[str, ...]

    @property
    def groups(self) -> int:
        return sum(self.candidates.values())

    @classmethod
    def of(cls, items: Iterable[Group | Skipped]) -> Survey:
        rows = disliked = 0
        candidates: Counter[int] = Counter()
        ties: Counter[int] = Counter()
        columns: Counter[str] = Counter()
        prompts: set[str] = set()
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
            prompts.add(item.prompt)
            columns.update(present_columns(item))
        return cls(
            rows=rows,
            candidates=dict(candidates),
            ties=dict(ties),
            disliked=disliked,
            prompts=len(prompts),
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
    """The names of the optional fields that this group has."""
    return [name for name in ("captions", "user") if getattr(group, name) is not None]


def inside(root: Path, name: str, origin: str) -> Path:
    """The picture `name`, relative to `root`, as an absolute path.

    Raises:
        UserError: the path leaves `root` (absolute, through `..`, or through a symbolic link), or is no path at all.
    """
    try:
        base = root.resolve()
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a symlink loop, a null byte
        raise UserError(f"{origin}: {name!r} is not a usable path: {error}") from error
    if not path.is_relative_to(base):
        raise UserError(f"{origin}: {name!r} leads outside {base}; pictures must lie in that folder")
    return path
