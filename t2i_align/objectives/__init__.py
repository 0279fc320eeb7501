"""Preference objectives, one file a method, found by name."""

from __future__ import annotations

from t2i_align.errors import unknown
from t2i_align.objectives.base import Objective
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.objectives.sft import SFT

OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (DiffusionDPO, SFT)}


def get(name: str) -> type[Objective]:
    """The objective of that name; an unknown name answers with the known ones."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]
