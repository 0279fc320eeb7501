"""What ends a run before its last step: held-out scores that no longer rise. Its weights are then those of the best."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from t2i_align.training.weights import Weights


class Best:
    """The best validation so far, by the mean of its first scorer, and what was trained by then, in CPU memory."""

    def __init__(self, weights: Weights, patience: int) -> None:
        self.weights, self.patience = weights, patience
        self.value, self.step, self.since = -math.inf, 0, 0
        self.tensors: dict[str, Tensor] = {}

    def see(self, name: str, value: float, step: int) -> str:
        """Count in the score of a validation; returns why the run ends here, or ""."""
        if value > self.value:
            self.value, self.step, self.since = value, step, 0
            self.tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in self._result.items()}
            return ""
        self.since += 1
        if self.since < self.patience:
            return ""
        return f"{name} has not risen since step {self.step} ({self.value:.4g}), now {value:.4g}"

    @torch.no_grad()
    def restore(self) -> None:
        """Give the trained tensors the values that they had at the best validation."""
        for key, tensor in self.tensors.items():
            self._result[key].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"value": self.value, "step": self.step, "since": self.since, "tensors": self.tensors}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        vars(self).update(state)

    @property
    def _result(self) -> Any:
        """The tensors that are validated and saved in the end, by name."""
        weights = self.weights
        return weights.policy if weights.result == "policy" else weights.variants[weights.result].tensors
