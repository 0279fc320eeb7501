"""The testbed's oracle as a scorer: importing this module registers `oracle`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_scorers import Scorer, ScorerError, register
from t2i_align.testbed.captions import parse
from t2i_align.testbed.oracle import Oracle


class TruthScorer(Scorer):
    """An oracle's reward; its parts are faithfulness, quality, strict and each attribute that a prompt may state.

    It is the truth of the testbed and not a model, so no gradient flows. Prompts have to be the testbed's captions.
    """

    differentiable = False
    tie_margin = 0.02  # without one, traces of quality decide between images that look the same
    oracle: Any
    parse: Callable[[str], object]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ScorerError for a prompt that is no caption of the testbed."""
        for row, prompt in enumerate(prompts):
            try:
                self.parse(prompt)
            except ValueError as error:
                raise ScorerError(f"{self.name}: prompts[{row}]: {error}") from error

    def _score(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        verdict = self._verdict(inputs, prompts)
        return as_tensor(verdict.reward), {name: as_tensor(values) for name, values in self._columns(verdict).items()}

    def _columns(self, verdict: Any) -> dict[str, np.ndarray]:
        return {name: getattr(verdict, name) for name in ("faithfulness", "quality", "strict")} | verdict.attributes

    def _verdict(self, pixels: Tensor, prompts: Sequence[str]) -> Any:
        if pixels.shape[-1] != pixels.shape[-2]:
            size = f"{pixels.shape[-1]} x {pixels.shape[-2]}"
            raise ScorerError(f"{self.name}: expected square {self.takes}, found {size}")
        self.check_prompts(prompts)
        return self.oracle.judge(pixels.detach().float().cpu(), prompts)


@register("oracle", argument=False)
class OracleScorer(TruthScorer):
    """The truth about images."""

    name = "oracle"
    version = Oracle.version
    parse = staticmethod(parse)

    def __init__(self) -> None:
        self.oracle = Oracle()


def as_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
