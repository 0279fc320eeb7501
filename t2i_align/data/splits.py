"""Which part of the data a group belongs to: a function of its prompt or user and a seed, and of nothing else.

So a prompt stays on its side when data are added, put in another order or read from another format.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import Literal

from t2i_align.data.schema import Group
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError

By = Literal["prompt", "user"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One side of a split.

    of: which side. held_out: the share of prompts (or users) that training does not see. by: what is kept apart; with
    both, a group whose prompt is on one side and whose user is on the other belongs to neither. Prompts that differ in
    letter case, spaces or Unicode form only are one. A group without a user counts by its prompt alone.
    """

    of: Literal["train", "held_out"]
    held_out: float = 0.1
    by: list[By] = field(default_factory=lambda: ["prompt"])
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise UserError(f"part.held_out must lie between 0 and 1, found {self.held_out!r}")
        if not self.by or set(self.by) - {"prompt", "user"}:
            raise UserError(f"part.by must be prompt, user or both, found {self.by!r}")

    def belongs(self, group: Group) -> bool | None:
        """Whether a group is on this side; None where it is on neither."""
        sides = set()
        if "prompt" in self.by or group.user is None:
            sides.add(self._is_held_out("prompt", normal(group.prompt)))
        if "user" in self.by and group.user is not None:
            sides.add(self._is_held_out("user", group.user))
        return None if len(sides) > 1 else sides.pop() == (self.of == "held_out")

    def _is_held_out(self, what: str, value: str) -> bool:
        text = value.encode(errors="backslashreplace").decode()  # what is no valid Unicode is told apart as well
        return stable_seed(self.seed, what, text) < self.held_out * 2**63


def normal(prompt: str) -> str:
    """A prompt as it is compared: letter case, runs of spaces and Unicode form are of no account."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
