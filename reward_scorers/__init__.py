"""Scorers of generated images. Usable on its own: `reward_scorers.build("clip:ViT-B-32:laion400m_e32")`."""

from reward_scorers.base import Judgement, Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.registry import build, build_all, check_spec, names, register
from reward_scorers.towers import Preprocess, TwoTowers, unit

__all__ = [
    "Judgement",
    "Preprocess",
    "Scorer",
    "ScorerError",
    "TwoTowers",
    "build",
    "build_all",
    "check_spec",
    "names",
    "register",
    "unit",
]
