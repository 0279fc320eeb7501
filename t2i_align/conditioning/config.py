"""The configuration of what conditions a model; needs no torch."""

from __future__ import annotations

from typing import Literal

from t2i_align.utils.settings import Count, settings


@settings
class SegmentsConfig:
    """Prompts of any length, encoded in segments (LongAlign, arXiv 2410.11817; see `conditioning.segments`).

    tokens: a prompt's sequence is padded to a multiple of it. bos, eos: the start and end tokens that are kept, of
    `each` segment, of the `first` or `last`, or of `none`. pooled: SDXL's pooled vector, the segments' `mean` or the
    `first` one's.
    """

    tokens: Count = 240
    bos: Literal["each", "first", "none"] = "each"
    eos: Literal["each", "last", "none"] = "none"
    pooled: Literal["mean", "first"] = "mean"
