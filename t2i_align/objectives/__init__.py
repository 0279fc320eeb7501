"""Preference objectives, one file per method, found by name. A method's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from t2i_align.errors import unknown

if TYPE_CHECKING:
    from t2i_align.objectives.base import Objective

# name: module and class. The one list of the objectives; it imports nothing, so that a wrong name is answered at once.
CLASSES = {
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
    "inpo": "inpo:InPO",
    "smpo": "smpo:SmPO",
    "reward": "reward:RewardTuning",
}


def check(name: Any) -> None:
    """Raise UserError unless there is an objective of that name; the error lists the names."""
    if not isinstance(name, str) or name not in CLASSES:
        raise unknown("objective", name, CLASSES)


def get(name: str) -> type[Objective]:
    """The objective of that name; an unknown name is answered with the known ones."""
    check(name)
    module, _, cls = CLASSES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), cls)


def __getattr__(attribute: str) -> Any:
    # `from t2i_align.objectives import DiffusionDPO`, and OBJECTIVES: every name with its class.
    if attribute == "OBJECTIVES":
        return {name: get(name) for name in CLASSES}
    for name, path in CLASSES.items():
        if path.endswith(f":{attribute}"):
            return get(name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
