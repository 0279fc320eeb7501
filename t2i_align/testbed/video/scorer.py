"""The oracle for clips as a scorer: importing this module registers `motion_oracle`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from reward_scorers import register
from t2i_align.testbed.scorer import TruthScorer, as_tensor
from t2i_align.testbed.video.captions import parse
from t2i_align.testbed.video.oracle import ClipVerdict, MotionOracle
from t2i_align.testbed.video.tracking import MIN_FRAMES


@register("motion_oracle", argument=False)
class MotionScorer(TruthScorer):
    """The truth about clips.

    `quality` is the mean over frames of `image` (how well each is drawn) times `temporal` (how steady it is); these
    two are parts as well.
    """

    name = "motion_oracle"
    version = MotionOracle.version
    takes, min_frames = "clips", MIN_FRAMES
    parse = staticmethod(parse)

    def __init__(self) -> None:
        self.oracle = MotionOracle()

    def frame_scores(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Quality of each frame [B, F] in [0, 1], for methods that learn from segments."""
        return as_tensor(self._verdict(pixels, prompts).frames)

    def _columns(self, verdict: ClipVerdict) -> dict[str, np.ndarray]:
        over_frames = {"image": verdict.image.mean(1), "temporal": verdict.temporal.mean(1)}
        return super()._columns(verdict) | over_frames
