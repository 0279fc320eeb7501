"""The oracle for clips as a scorer: importing this module registers `motion_oracle`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reward_scorers import Scorer, ScorerError, register
from t2i_align.testbed.video.captions import parse
from t2i_align.testbed.video.oracle import MotionOracle
from t2i_align.testbed.video.tracking import MIN_FRAMES


class MotionScorer(Scorer):
    """The motion oracle's reward; its parts are faithfulness, quality, strict and each attribute a prompt may state.

    `quality` is the mean over frames of `picture` (how well each is drawn) times `temporal` (how steady it is). It is
    the truth of the testbed and not a model, so no gradient flows. Prompts have to be the testbed's video captions.
    """

    name = "motion_oracle"
    clips = True
    differentiable = False
    tie_margin = 0.02  # without one, traces of quality decide between clips that look the same

    def __init__(self) -> None:
        self.oracle = MotionOracle()
        self.version = str(self.oracle.version)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ScorerError for a prompt that is no video caption of the testbed."""
        for row, prompt in enumerate(prompts):
            try:
                parse(prompt)
            except ValueError as error:
                raise ScorerError(f"{self.name}: prompts[{row}]: {error}") from error

    def frame_scores(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Quality of each frame [B, F] in [0, 1], for methods that learn from segments."""
        return _tensor(self.oracle.judge(pixels.detach().float().cpu(), prompts).frames)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._judge(pixels, prompts)[0]

    def _judge(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if pixels.shape[1] < MIN_FRAMES:
            raise ScorerError(f"{self.name}: expected clips of {MIN_FRAMES} frames or more, found {pixels.shape[1]}")
        if pixels.shape[-1] != pixels.shape[-2]:
            raise ScorerError(f"{self.name}: expected square clips, found {pixels.shape[-1]} x {pixels.shape[-2]}")
        self.check_prompts(prompts)
        verdict = self.oracle.judge(pixels.detach().float().cpu(), prompts)
        named = {
            "faithfulness": verdict.faithfulness,
            "quality": verdict.quality,
            "strict": verdict.strict,
            "picture": verdict.picture.mean(1),
            "temporal": verdict.temporal.mean(1),
            **verdict.attributes,
        }
        return _tensor(verdict.reward), {name: _tensor(values) for name, values in named.items()}


@register("motion_oracle")
def _build(argument: str) -> MotionScorer:
    if argument:
        raise ScorerError(f"motion_oracle: takes no argument, found {argument!r}")
    return MotionScorer()


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
