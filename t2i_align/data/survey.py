"""Counts over a source: what an objective needs to know of it before a run, and how far it can be trusted."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from t2i_align.data.media import ImageError, decode
from t2i_align.data.schema import COLUMNS, Group, Skipped

REASONS_SHOWN = 3


@dataclass
class Survey:
    """What a source holds, without opening its images.

    candidates: number of groups by their k. ties: those of them whose best and worst score are equal. disliked: single
    samples that were not liked. texts: prompts and captions. columns: how many groups have each column (see
    `Group.present`). skips: rows that cannot be used by their reasons. reasons: the first of these with their origin.
    accepted, score_range: number of groups that a selection accepts, and their least and greatest score.
    """

    candidates: Counter[int] = field(default_factory=Counter)
    ties: Counter[int] = field(default_factory=Counter)
    disliked: int = 0
    texts: set[str] = field(default_factory=set)
    columns: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    accepted: int = 0
    score_range: tuple[float, float] = (math.inf, -math.inf)

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

    def accept(self, group: Group) -> None:
        """Count a group that a selection accepts."""
        least, greatest = self.score_range
        self.accepted += 1
        self.score_range = min(least, *group.scores), max(greatest, *group.scores)


@dataclass
class Findings(Survey):
    """A survey with users, prompts and images, the last over the first so many groups (`opened`).

    judged: per prompt and images, the preference of each group with them. by_scorer: each scorer's scores of groups,
    with the labels. shares: of votes for the loser of a pair. lengths, limits: prompt lengths in words or in an
    encoder's tokens, and how many it takes.
    """

    source: str = ""
    format: str = ""
    names: Sequence[str] = ()
    opened: int = 0
    users: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    twins: int = 0
    judged: dict[tuple[Any, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    shares: list[float] = field(default_factory=list)
    by_scorer: list[dict[str, Sequence[float]]] = field(default_factory=list)
    examples: list[Group] = field(default_factory=list)

    @property
    def duplicates(self) -> int:
        """Images with the fingerprint of an earlier one."""
        return sum(count - 1 for count in self.images.values())

    @property
    def disagreement(self) -> tuple[int, float | None]:
        """How many pairs were judged more than once, and the share of two judgements of them that differ."""
        again = [votes for votes in self.judged.values() if len(votes) > 1]
        differing = [a != b for votes in again for a, b in combinations(votes, 2)]
        return len(again), sum(differing) / len(differing) if differing else None

    def agreement(self) -> dict[tuple[str, str], float]:
        """The share of candidate pairs, without ties, that two scorers order alike; `label` is the source's own."""
        same: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for scores in self.by_scorer:
            for one, other in combinations(scores, 2):
                for i, j in combinations(range(len(scores[one])), 2):
                    first, second = scores[one][i] - scores[one][j], scores[other][i] - scores[other][j]
                    if first and second:
                        same[one, other].append((first > 0) == (second > 0))
        return {names: sum(values) / len(values) for names, values in same.items()}

    def summary(self) -> str:
        """A few lines for the terminal."""
        again, differing = self.disagreement
        lines = [
            f"{self.source}: {self.format}, columns {', '.join(self.names) or 'none'}",
            f"{self.groups} groups, {self.skips.total()} rows skipped, {self.ties.total()} ties, "
            f"{len(self.prompts)} prompts, {len(self.users)} users",
            f"{self.opened} groups opened: {self.sizes.total()} images, {self.duplicates} seen before, "
            f"{self.twins} groups with the same image twice, {self.unreadable.total()} unreadable",
        ]
        for name, limit in self.limits.items():
            lines.append(f"{sum(length > limit for length in self.lengths[name])} prompts exceed {limit} {name}")
        if differing is not None:
            lines.append(f"{again} pairs were judged more than once; two judgements differ in {differing:.1%}")
        return "\n".join(lines)

    def add(self, item: Group | Skipped) -> None:
        super().add(item)
        if isinstance(item, Group):
            self.prompts[item.prompt] += 1
            self.users.update([] if item.user is None else [item.user])
            if len(item.scores) == 2 and abs(sum(item.scores) - 1) < 1e-6 and min(item.scores) >= 0:
                self.shares.append(min(item.scores))

    def count_images(self, group: Group) -> None:
        """Decode a group's images and compare their fingerprints."""
        self.opened += 1
        try:
            images = [decode(media) for media in group.candidates]
        except ImageError as error:
            self.unreadable[str(error)] += 1
            return
        self.sizes.update(image.size for image in images)
        prints = [fingerprint(image) for image in images]
        self.images.update(prints)
        self.twins += len(set(prints)) < len(prints)
        if len(prints) == 2:  # the same pair may be listed the other way round
            preferred = (group.scores[0] > group.scores[1]) - (group.scores[0] < group.scores[1])
            key = (group.prompt, *sorted(prints))
            self.judged[key].append(preferred if prints == sorted(prints) else -preferred)


def fingerprint(image: Image.Image) -> str:
    """A perceptual hash: where brightness rises from left to right on 9 x 8 pixels (dHash), and the mean colour.

    Equal for an image that was scaled or saved again; the colour tells plain images apart.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    rises = np.packbits(small[:, 1:] > small[:, :-1] + 2).tobytes().hex()
    colour = np.asarray(image.resize((1, 1), Image.Resampling.BOX)).reshape(-1) // 16
    return rises + bytes(colour.astype(np.uint8)).hex()
