"""Simulated annotators: from what the oracle knows of two images to a preference.

Labels are P(first preferred), the convention of Pick-a-Pic's `label_0`: 1.0, 0.0 or 0.5 (a tie). Randomness comes from
the generator that the caller passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from t2i_align.testbed.oracle import Verdict
from t2i_align.testbed.vision import View

WARM = ("red", "orange", "yellow", "pink")
# What tastes are about: only what a caption may leave open.
TRAITS = ("white", "black", "big", "warm", "crowded", "left", "high")


def traits(views: Sequence[View]) -> np.ndarray:
    """Features [B, 7] of images in the order of `TRAITS`, each about in [-1, 1]."""
    rows = []
    for view in views:
        objects = view.objects
        number = max(len(objects), 1)
        big = sum(o.size == "large" for o in objects) / number
        warm = sum(o.colour in WARM for o in objects) / number
        x, y = np.mean([(o.x, o.y) for o in objects], axis=0) if objects else (32.0, 32.0)
        white, black = float(view.background == "white"), float(view.background == "black")
        rows.append([white, black, big, warm, (len(objects) - 2) / 2, (32 - x) / 32, (32 - y) / 32])
    return np.asarray(rows, float).reshape(-1, len(TRAITS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotator:
    """Prefers the higher score, `care` x the oracle's reward + `weights` . traits; by default an expert.

    Attributes:
        margin: scores that differ by no more are a tie.
        flip: probability of the opposite label.
        temperature: label by Bradley-Terry instead, without ties: the first is preferred with probability
            sigmoid((score of the first - score of the second) / temperature).
        user_id: of a person, in the rows that `pairs` writes.

    Raises:
        ValueError: `flip` outside [0, 0.5], a temperature that is not positive, or both at once.
    """

    care: float = 1.0
    weights: tuple[float, ...] = (0.0,) * len(TRAITS)
    margin: float = 0.02
    flip: float = 0.0
    temperature: float | None = None
    user_id: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.flip <= 0.5:
            raise ValueError(f"flip must lie in [0, 0.5], not {self.flip}")
        if self.temperature is not None and (self.temperature <= 0.0 or self.flip):
            raise ValueError("a temperature must be positive, and excludes flip")

    def score(self, verdict: Verdict) -> np.ndarray:
        """How much each image is liked [B]."""
        return self.care * verdict.reward + traits(verdict.views) @ np.asarray(self.weights)

    def label(self, first: Verdict, second: Verdict, rng: np.random.Generator) -> np.ndarray:
        """Labels [B] in {0, 0.5, 1} of image i of `first` against image i of `second`, which have one prompt."""
        a, b = self.score(first), self.score(second)
        if self.temperature is not None:
            odds = np.clip((a - b) / self.temperature, -50, 50)
            return (rng.random(len(a)) < 1.0 / (1.0 + np.exp(-odds))).astype(float)
        labels = np.where(np.abs(a - b) <= self.margin, 0.5, (a > b).astype(float))
        return np.where(rng.random(len(a)) < self.flip, 1.0 - labels, labels)


def biased(strength: float = 0.3) -> Annotator:
    """An expert with a weakness for a bright background and big objects."""
    return Annotator(weights=tuple(strength * (trait in ("white", "big")) for trait in TRAITS))
