"""Simulated annotators: functions from what the oracle knows of two images to a preference.

All return P(first preferred) labels as 1.0, 0.0 or 0.5 (a tie), the convention of Pick-a-Pic's
`label_0`. Randomness comes from the generator that the caller passes, never from global state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from t2i_align.testbed.oracle import Verdict
from t2i_align.testbed.vision import View

WARM = ("red", "orange", "yellow", "pink")
# What tastes are about: only what a caption may leave open.
TRAITS = ("white", "black", "big", "warm", "crowded", "left", "high")


class Annotator(Protocol):
    """Compares image i of `first` with image i of `second` (same prompt)."""

    def label(self, first: Verdict, second: Verdict, rng: np.random.Generator) -> np.ndarray:
        """Labels [B] in {0, 0.5, 1}: 1 where the first is preferred."""


def _compare(a: np.ndarray, b: np.ndarray, margin: float) -> np.ndarray:
    return np.where(np.abs(a - b) <= margin, 0.5, (a > b).astype(float))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert:
    """Prefers the higher oracle reward; a tie within `margin`."""

    margin: float = 0.02

    def label(self, first: Verdict, second: Verdict, rng: np.random.Generator) -> np.ndarray:
        return _compare(first.reward, second.reward, self.margin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noisy:
    """An expert that errs: flips with probability `flip`, or by Bradley-Terry when `temperature` is set.

    Bradley-Terry prefers the first with probability sigmoid((r_first - r_second) / temperature); then
    `flip` must be 0, and there are no ties.

    Raises:
        ValueError: `flip` outside [0, 0.5], a temperature that is not positive, or both at once.
    """

    flip: float = 0.0
    temperature: float | None = None
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 <= self.flip <= 0.5:
            raise ValueError(f"flip must lie in [0, 0.5], not {self.flip}")
        if self.temperature is not None and (self.temperature <= 0.0 or self.flip):
            raise ValueError("a temperature must be positive, and excludes flip")

    def label(self, first: Verdict, second: Verdict, rng: np.random.Generator) -> np.ndarray:
        draw = rng.random(len(first.reward))
        if self.temperature is not None:
            odds = np.clip((first.reward - second.reward) / self.temperature, -50, 50)
            return (draw < 1.0 / (1.0 + np.exp(-odds))).astype(float)
        labels = _compare(first.reward, second.reward, self.margin)
        return np.where(draw < self.flip, 1.0 - labels, labels)


def traits(views: Sequence[View]) -> np.ndarray:
    """Features [B, 7] of images in the order of `TRAITS`, each about in [-1, 1]."""
    rows = []
    for view in views:
        objects = view.objects
        number = max(len(objects), 1)
        big = sum(o.size == "large" for o in objects) / number
        warm = sum(o.colour in WARM for o in objects) / number
        x = sum(o.x for o in objects) / number if objects else 32.0
        y = sum(o.y for o in objects) / number if objects else 32.0
        white, black = float(view.background == "white"), float(view.background == "black")
        rows.append([white, black, big, warm, (len(objects) - 2) / 2, (32 - x) / 32, (32 - y) / 32])
    return np.asarray(rows, float).reshape(-1, len(TRAITS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biased:
    """An expert with a weakness: reward plus `strength` x (bright background + big objects)."""

    strength: float = 0.3
    margin: float = 0.02

    def label(self, first: Verdict, second: Verdict, rng: np.random.Generator) -> np.ndarray:
        lure = np.zeros(len(TRAITS))
        lure[[TRAITS.index("white"), TRAITS.index("big")]] = self.strength
        a, b = (v.reward + traits(v.views) @ lure for v in (first, second))
        return _compare(a, b, self.margin)


@dataclasses.dataclass(frozen=True)
class Person:
    """Someone with taste: `weights` over `TRAITS`, on top of `care` x the oracle's reward."""

    user_id: int
    type_id: int
    weights: tuple[float, ...]
    care: float = 1.0
    margin: float = 0.02

    def score(self, verdict: Verdict) -> np.ndarray:
        """How much the person likes each image [B]."""
        return self.care * verdict.reward + traits(verdict.views) @ np.asarray(self.weights)

    def label(self, first: Verdict, second: Verdict, rng: np.random.Generator) -> np.ndarray:
        return _compare(self.score(first), self.score(second), self.margin)


def sample_people(
    number: int, *, types: int = 4, spread: float = 0.15, care: float = 1.0, seed: int = 0
) -> list[Person]:
    """People drawn from a few hidden types, each with individual variation around the type's taste.

    Args:
        number: how many people; type k has every `types`-th person.
        types: how many hidden types, whose tastes are standard normal over `TRAITS`.
        spread: standard deviation of an individual's weights around the type's.
        care: how much the oracle's reward counts beside taste.
    """
    if types < 1 or number < types:
        raise ValueError(f"need at least one type and a person for each, not {number} people of {types} types")
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((types, len(TRAITS)))
    return [
        Person(i, i % types, tuple(centres[i % types] + spread * rng.standard_normal(len(TRAITS))), care)
        for i in range(number)
    ]
