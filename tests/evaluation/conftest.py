"""A tiny model against itself or another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_scorers import Scorer
from t2i_align.evaluation.compare import evaluate
from t2i_align.evaluation.result import Evaluation
from tests.tiny import tiny_sd

PROMPTS = ["cat", "dog", "<script>alert(1)</script>", "a & b", "sun"]
FAST = {"steps": 2, "guidance": 2.0, "progress": False}
Run = Callable[..., Evaluation]


class Red(Scorer):
    """Mean red; parts: green, and blue for prompts without "a" only."""

    name = "red"
    version = "7"

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        red, green, blue = inputs.mean((2, 3)).unbind(1)
        silent = torch.tensor(["a" in prompt for prompt in prompts])
        return red, {"green": green, "blue": blue.masked_fill(silent, math.nan)}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def run(sd_path: Path, tmp_path: Path) -> Run:
    """`evaluate` of the model against itself, with changes; `out` is relative to the test's folder."""

    def evaluated(out: str = "out", **changes: Any) -> Evaluation:
        options = {"base": sd_path, "aligned": sd_path, "prompts": PROMPTS, "scorers": [Red()], **FAST, **changes}
        return evaluate(out=tmp_path / out, **options)

    return evaluated
