"""Preference objectives, one file per method, found by name."""

from __future__ import annotations

from t2i_align.errors import unknown
from t2i_align.objectives.base import Objective
from t2i_align.objectives.dcpo import DCPO
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.objectives.dmpo import DMPO
from t2i_align.objectives.dspo import DSPO
from t2i_align.objectives.inpo import InPO
from t2i_align.objectives.kto import DiffusionKTO
from t2i_align.objectives.lcpo import LCPO
from t2i_align.objectives.lpo import DiffusionLPO
from t2i_align.objectives.mapo import MaPO
from t2i_align.objectives.ncp import NCPDPO
from t2i_align.objectives.rankdpo import RankDPO
from t2i_align.objectives.sft import SFT
from t2i_align.objectives.smpo import SmPO
from t2i_align.objectives.softrepa import SoftREPA
from t2i_align.objectives.tdpo import TDPO, TKTO

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        DiffusionDPO,
        SFT,
        MaPO,
        DCPO,
        TDPO,
        TKTO,
        DiffusionKTO,
        RankDPO,
        DiffusionLPO,
        DMPO,
        LCPO,
        DSPO,
        NCPDPO,
        SoftREPA,
        InPO,
        SmPO,
    )
}


def get(name: str) -> type[Objective]:
    """The objective of that name; an unknown name answers with the known ones."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]
