"""Preference objectives, one file per method, found by name. A method's module is imported when it is asked for.

One of your own is a subclass of `Objective`; `@register` makes its `name` known.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from t2i_align.errors import UserError
from t2i_align.plugins import find
from t2i_align.plugins import register as enter

if TYPE_CHECKING:
    from t2i_align.objectives.base import Metrics as Metrics
    from t2i_align.objectives.base import Objective as Objective
    from t2i_align.objectives.base import Requirements as Requirements
    from t2i_align.objectives.dcpo import DCPO as DCPO
    from t2i_align.objectives.dense_dpo import DenseDPO as DenseDPO
    from t2i_align.objectives.diffusion_dpo import DiffusionDPO as DiffusionDPO
    from t2i_align.objectives.diffusion_dpo import DiffusionDPO as Pairwise
    from t2i_align.objectives.dmpo import DMPO as DMPO
    from t2i_align.objectives.dspo import DSPO as DSPO
    from t2i_align.objectives.inpo import InPO as InPO
    from t2i_align.objectives.kto import DiffusionKTO as DiffusionKTO
    from t2i_align.objectives.lcpo import LCPO as LCPO
    from t2i_align.objectives.listwise import Listwise as Listwise
    from t2i_align.objectives.lpo import DiffusionLPO as DiffusionLPO
    from t2i_align.objectives.mapo import MaPO as MaPO
    from t2i_align.objectives.ncp import NCPDPO as NCPDPO
    from t2i_align.objectives.rankdpo import RankDPO as RankDPO
    from t2i_align.objectives.reward import RewardTuning as RewardTuning
    from t2i_align.objectives.sft import SFT as SFT
    from t2i_align.objectives.smpo import SmPO as SmPO
    from t2i_align.objectives.softrepa import SoftREPA as SoftREPA
    from t2i_align.objectives.tdpo import TDPO as TDPO
    from t2i_align.objectives.tdpo import TKTO as TKTO

    OBJECTIVES: dict[str, type[Objective]]

# name: module and class. The one list of the objectives; it imports nothing, so that a wrong name is answered at once.
CLASSES: dict[str, Any] = {
    "diffusion_dpo": "diffusion_dpo:DiffusionDPO",
    "sft": "sft:SFT",
    "mapo": "mapo:MaPO",
    "dcpo": "dcpo:DCPO",
    "tdpo": "tdpo:TDPO",
    "tkto": "tdpo:TKTO",
    "kto": "kto:DiffusionKTO",
    "rankdpo": "rankdpo:RankDPO",
    "lpo": "lpo:DiffusionLPO",
    "dmpo": "dmpo:DMPO",
    "lcpo": "lcpo:LCPO",
    "dspo": "dspo:DSPO",
    "ncp_dpo": "ncp:NCPDPO",
    "softrepa": "softrepa:SoftREPA",
    "dense_dpo": "dense_dpo:DenseDPO",
    "inpo": "inpo:InPO",
    "smpo": "smpo:SmPO",
    "reward": "reward:RewardTuning",
}


AnyObjective = TypeVar("AnyObjective", bound="type[Objective]")


def register(cls: AnyObjective) -> AnyObjective:
    """Class decorator: configurations know the objective by its `name`. Raises UserError where another one has it."""
    enter(CLASSES, _checked(cls).name, cls, "objective")
    return cls


def check(name: Any) -> None:
    """Raise UserError unless there is an objective of that name or place; the error lists the names."""
    _checked(name) if isinstance(name, type) else find("objective", name, CLASSES)


def get(name: str | type[Objective]) -> type[Objective]:
    """The objective of that name, or at `file.py:Class` or `package.module:Class`; a class is itself."""
    found = name if isinstance(name, type) else find("objective", name, CLASSES)
    if not isinstance(found, str):
        return _checked(found, str(name))
    return _imported(found)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)


def _checked(cls: Any, place: str = "") -> type[Objective]:
    """A class from outside; raises UserError for what it lacks."""
    from t2i_align.objectives.base import Objective

    shown = place or getattr(cls, "__qualname__", repr(cls))
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise UserError(f"objective {shown}: expected a subclass of t2i_align.objectives.Objective, found {cls!r}")
    if missing := [key for key in ("name", "needs") if not hasattr(cls, key)]:
        raise UserError(f"objective {shown}: the class lacks {' and '.join(missing)}")
    return cls


def __getattr__(attribute: str) -> Any:
    # `from t2i_align.objectives import DiffusionDPO`, and OBJECTIVES: every name with its class.
    if attribute == "OBJECTIVES":
        return {name: get(name) for name in CLASSES}
    if path := CONTRACT.get(attribute) or next((p for p in CLASSES.values() if str(p).endswith(f":{attribute}")), None):
        return _imported(path)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


# What an objective is written with, and where it is; a method on pairs is a kind of Diffusion-DPO.
CONTRACT = {
    "Listwise": "listwise:Listwise",
    "Metrics": "base:Metrics",
    "Objective": "base:Objective",
    "Pairwise": "diffusion_dpo:DiffusionDPO",
    "Requirements": "base:Requirements",
}
__all__ = [
    "CLASSES",
    "DCPO",
    "DMPO",
    "DSPO",
    "LCPO",
    "NCPDPO",
    "OBJECTIVES",
    "SFT",
    "TDPO",
    "TKTO",
    "DenseDPO",
    "DiffusionDPO",
    "DiffusionKTO",
    "DiffusionLPO",
    "InPO",
    "Listwise",
    "MaPO",
    "Metrics",
    "Objective",
    "Pairwise",
    "RankDPO",
    "Requirements",
    "RewardTuning",
    "SmPO",
    "SoftREPA",
    "register",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
