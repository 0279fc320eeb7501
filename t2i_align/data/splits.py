"""The one held-out split: a function of (seed, kind, normalised text) and of nothing else.

So a prompt stays on its side when data are added, reordered or read from another format, and whoever splits by the
same seed and share (`data split`, `train-scorer`) holds out the same prompts.
"""

from __future__ import annotations

import unicodedata
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from t2i_align.data.schema import Group
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.utils.settings import Float, Int, settings

By = Literal["prompt", "user"]


def is_held_out(kind: By, text: str, *, share: float, seed: int) -> bool:
    """Whether a prompt or user is among the `share` (0 … 1) of all texts that training does not see."""
    text = normalise(text) if kind == "prompt" else text
    text = text.encode(errors="backslashreplace").decode()  # lone surrogates stay distinct
    return stable_seed(seed, kind, text) < share * 2**63


def normalise(prompt: str) -> str:
    """Normalise a prompt for comparison: NFKC, case-folded, whitespace collapsed."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


@settings
class Part:
    """One side of a split.

    of: which side. held_out: the share of prompts (or users) that training does not see. by: what is kept apart; with
    both, a group whose prompt is on one side and whose user is on the other belongs to neither. Prompts are compared
    normalised. A group without a user counts by its prompt alone.
    """

    of: Literal["train", "held_out"]
    held_out: Annotated[Float, Field(gt=0, lt=1, description="a number in (0, 1)")] = 0.1
    by: Annotated[list[By], Field(min_length=1)] = field(default_factory=lambda: ["prompt"])
    seed: Int = 0

    def belongs(self, group: Group) -> bool | None:
        """Whether a group is on this side; None where it is on neither."""
        sides = set()
        if "prompt" in self.by or group.user is None:
            sides.add(is_held_out("prompt", group.prompt, share=self.held_out, seed=self.seed))
        if "user" in self.by and group.user is not None:
            sides.add(is_held_out("user", group.user, share=self.held_out, seed=self.seed))
        return None if len(sides) > 1 else sides.pop() == (self.of == "held_out")
