"""Scorers of generated images. Usable on its own: `reward_scorers.build("clip:ViT-B-32:laion400m_e32")`."""

from reward_scorers.base import Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.registry import build, build_all, check_spec, names, register

__all__ = ["Scorer", "ScorerError", "build", "build_all", "check_spec", "names", "register"]
