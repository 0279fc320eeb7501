"""What is counted over a source: groups, users, prompts, images seen twice, disagreement between judgements."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from t2i_align.data.media import ImageError, decode
from t2i_align.data.schema import Group


@dataclass
class Findings:
    """Counts over a source; those of images over its first so many groups (`opened`).

    judged: per prompt and images, the preference of each group with them. by_scorer: each scorer's scores of groups,
    with the labels. shares: of votes for the loser of a pair. lengths, limits: prompt lengths in words or in an
    encoder's tokens, and how many it takes.
    """

    source: str
    format: str
    columns: list[str]
    groups: int = 0
    opened: int = 0
    ties: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    candidates: Counter[int] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
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
            f"{self.source}: {self.format}, columns {', '.join(self.columns) or 'none'}",
            f"{self.groups} groups, {sum(self.skips.values())} rows skipped, {self.ties} ties, "
            f"{len(self.prompts)} prompts, {len(self.users)} users",
            f"{self.opened} groups opened: {sum(self.sizes.values())} images, {self.duplicates} seen before, "
            f"{self.twins} groups with the same image twice, {sum(self.unreadable.values())} unreadable",
        ]
        for name, limit in self.limits.items():
            lines.append(f"{sum(length > limit for length in self.lengths[name])} prompts exceed {limit} {name}")
        if differing is not None:
            lines.append(f"{again} pairs were judged more than once; two judgements differ in {differing:.1%}")
        return "\n".join(lines)

    def count(self, group: Group) -> None:
        """Add what a group says without its images."""
        self.groups += 1
        self.candidates[len(group.candidates)] += 1
        self.ties += group.is_tie
        self.present.update(group.present)
        self.prompts[group.prompt] += 1
        self.users.update([] if group.user is None else [group.user])
        if len(group.scores) == 2 and abs(sum(group.scores) - 1) < 1e-6 and min(group.scores) >= 0:
            self.shares.append(min(group.scores))

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
