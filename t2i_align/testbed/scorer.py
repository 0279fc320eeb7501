"""The testbed's oracles as scorers: importing this module registers `oracle`, `motion_oracle` and `long_oracle`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_scorers import Scorer, ScorerError, register
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.tracking import MIN_FRAMES
from t2i_align.testbed.world import CLIPS, IMAGES, LONG, World


@register("oracle")
class OracleScorer(Scorer):
    """The truth about images: parts are faithfulness, quality, strict and each attribute that a prompt may state.

    No model, so no gradient flows. Prompts have to be the testbed's captions.
    """

    name = "oracle"
    version = Oracle.version
    differentiable = False
    tie_margin = 0.02  # without one, traces of quality decide between images that look the same
    world: World = IMAGES

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ScorerError for a prompt that is no caption of the testbed."""
        for row, prompt in enumerate(prompts):
            try:
                self.world.language.parse(prompt)
            except ValueError as error:
                raise ScorerError(f"{self.name}: prompts[{row}]: {error}") from error

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        verdict = self._verdict(inputs, prompts)
        return _tensor(verdict.reward), {name: _tensor(values) for name, values in verdict.columns().items()}

    def _verdict(self, pixels: Tensor, prompts: Sequence[str]) -> Any:
        height, width = pixels.shape[-2:]
        if height != width:
            raise ScorerError(f"{self.name}: expected square {self.takes}, found {width} x {height}")
        self.check_prompts(prompts)
        return self.world.oracle().judge(pixels.detach().float().cpu(), prompts)


@register("motion_oracle")
class ClipOracleScorer(OracleScorer):
    """The truth about clips.

    `quality` is the mean over frames of `image` (how well each is drawn) times `temporal` (how steady it is); these
    two are parts as well.
    """

    name = "motion_oracle"
    takes, min_frames = "clips", MIN_FRAMES
    world = CLIPS

    def frame_scores(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Quality of each frame [B, F] in [0, 1], for methods that learn from segments."""
        return _tensor(self._verdict(pixels, prompts).frames)


@register("long_oracle")
class LongOracleScorer(OracleScorer):
    """The truth about images of long captions.

    Further parts: `sentences`, the share of sentences that hold as a whole, and `last`, that of what the last sentence
    alone states.
    """

    name = "long_oracle"
    world = LONG


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
