"""What a source holds: which groups an objective learns from, counts, and a hash that it is known by."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from t2i_align.data.schema import COLUMNS, Group, Items, Skipped
from t2i_align.errors import UserError

REASONS_SHOWN = 3  # rows that cannot be used, in a message
CONTENT_HASHED_UP_TO = 256 << 20  # bytes


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
class Survey:
    """What a source holds, without opening its images.

    candidates: number of groups by their k. ties: those of them whose best and worst score are equal. disliked: single
    samples that were not liked. texts: prompts and captions. columns: how many groups have each column (see
    `Group.present`). skips: rows that cannot be used by their reasons. reasons: the first of these with their origin.
    accepted, score_range: number of groups that the selection accepts, and their least and greatest score. identity: a
    hash of all groups and their images. embedded_bytes: an upper bound for images inside the source's own files.
    """

    selection: Selection = EVERYTHING
    candidates: Counter[int] = field(default_factory=Counter)
    ties: Counter[int] = field(default_factory=Counter)
    disliked: int = 0
    texts: set[str] = field(default_factory=set)
    columns: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    accepted: int = 0
    score_range: tuple[float, float] = (math.inf, -math.inf)
    identity: str = ""
    embedded_bytes: int = 0

    @property
    def groups(self) -> int:
        return self.candidates.total()

    @property
    def rows(self) -> int:
        """Groups and skipped rows."""
        return self.groups + self.skips.total()

    @property
    def texts_per_group(self) -> int:
        """How many texts are encoded of a group at most: its prompt and those of the columns."""
        texts = [column for column in COLUMNS.values() if column.text and self.columns.get(column.name)]
        return 1 + sum(max(self.candidates) if column.per_candidate else 1 for column in texts)

    def check_usable(self, source: str | Path) -> None:
        """Raise UserError with the first reasons where no row can be used."""
        if not self.groups:
            reasons = "; ".join(self.reasons)
            raise UserError(f"{source}: no usable group among {self.rows} rows. First reasons: {reasons}")

    def add(self, item: Group | Skipped) -> None:
        """Count an item of the source."""
        if isinstance(item, Skipped):
            self.skips[item.reason] += 1
            self.reasons += [f"{item.origin}: {item.reason}"] if len(self.reasons) < REASONS_SHOWN else []
            return
        k = len(item.candidates)
        self.candidates[k] += 1
        self.ties.update([k] if item.is_tie else [])
        self.disliked += item.is_disliked
        self.texts.update(item.texts)
        self.columns.update(item.present)
        if self.selection.accepts(item):
            least, greatest = self.score_range
            self.accepted += 1
            self.score_range = min(least, *item.scores), max(greatest, *item.scores)


def counted(k: np.ndarray) -> Counter[int]:
    """How many groups there are of each number of candidates, from all groups' numbers."""
    return +Counter(dict(enumerate(np.bincount(k).tolist())))  # without zeros


class Contents:
    """A hash of groups and their images; beyond CONTENT_HASHED_UP_TO, sizes and times of files stand for their content.

    embedded: whether images lie in the source's own files, which then count instead.
    """

    def __init__(self) -> None:
        self.digest, self.hashed, self.embedded = hashlib.sha256(), 0, False

    def add(self, group: Group) -> None:
        paths = [media for media in group.candidates if isinstance(media, Path)]
        self.embedded |= len(paths) < len(group.candidates)
        names = [os.fsencode(media.name).hex() for media in paths]
        row = [group.id, group.prompt, group.scores, dict(group.columns), names]
        self.digest.update(json.dumps(row, sort_keys=True).encode())
        for media in paths:
            if media.is_dir():
                from t2i_align.data.media import frame_files  # objectives import this module, and it the decoders

                for file in frame_files(media):
                    self.add_file(file)
            else:
                self.add_file(media)

    def add_file(self, file: Path) -> None:
        stat = file.stat()
        self.hashed += stat.st_size
        large = f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape")
        self.digest.update(large if self.hashed > CONTENT_HASHED_UP_TO else hashlib.sha256(file.read_bytes()).digest())
