"""The testbed's oracle as a scorer: importing this module registers `oracle`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reward_scorers import Scorer, ScorerError, register
from t2i_align.testbed.captions import parse
from t2i_align.testbed.oracle import Oracle


class OracleScorer(Scorer):
    """The oracle's reward; its parts are faithfulness, quality, strict and each attribute that a prompt may state.

    It is the truth of the testbed and not a model, so no gradient flows. Prompts have to be the testbed's captions.
    """

    name = "oracle"
    differentiable = False
    tie_margin = 0.02  # without one, traces of quality decide between pictures that look the same

    def __init__(self) -> None:
        self.oracle = Oracle()
        self.version = str(self.oracle.version)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ScorerError for a prompt that is no caption of the testbed."""
        for row, prompt in enumerate(prompts):
            try:
                parse(prompt)
            except ValueError as error:
                raise ScorerError(f"oracle: prompts[{row}]: {error}") from error

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._judge(pixels, prompts)[0]

    def _judge(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if pixels.shape[-1] != pixels.shape[-2]:
            raise ScorerError(f"oracle: expected square pictures, found {pixels.shape[-1]} x {pixels.shape[-2]}")
        self.check_prompts(prompts)
        verdict = self.oracle.judge(pixels.detach().float().cpu(), prompts)
        named = {
            "faithfulness": verdict.faithfulness,
            "quality": verdict.quality,
            "strict": verdict.strict,
            **verdict.attributes,
        }
        return _tensor(verdict.reward), {name: _tensor(values) for name, values in named.items()}


@register("oracle")
def _build(argument: str) -> OracleScorer:
    if argument:
        raise ScorerError(f"oracle: takes no argument, found {argument!r}")
    return OracleScorer()


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
