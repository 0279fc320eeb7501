"""The contract of an objective: what it needs, and one step from noised candidates to a loss per group.

Symbols, the same in every file: `err` is the per-sample mean squared difference between prediction and target in
float32, `_w` the preferred candidate, `_l` the other, `ref_` the reference's. `beta` is in the published
Diffusion-DPO convention: the logit is h = -1/2 beta (s_w - s_l) with s = err - ref_err.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from t2i_align.data.schema import Batch, Model
from t2i_align.diffusion.randomness import SampleRNG

Metrics = dict[str, Tensor]  # [B] each; NaN where a metric does not apply to a group


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """What an objective may be fitted to. score_range: the least and the greatest score of the data."""

    score_range: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What an objective wants; checked before anything loads.

    candidates: at least so many a group; 2 means a pair: larger groups give their best and worst, unless the objective
    takes whole `lists`. ties: whether a group whose best and worst score are equal teaches it anything. likes_only: a
    single sample must have been liked. reference: whether it asks a reference model. features: whether it asks that
    reference for features. columns: optional fields of `Group` it reads.
    """

    candidates: int = 1
    ties: bool = True
    likes_only: bool = False
    reference: bool = False
    features: bool = False
    lists: bool = False
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people: what data, and whether a reference."""
        if self.candidates > 1:
            data = "rankings" if self.lists else "pairs"
        else:
            data = "winners or liked images" if self.likes_only else "likes and dislikes, or groups"
        also = [name.replace("_", " ") for name in self.columns]
        also += ["a reference's features"] if self.features else ["a reference"] if self.reference else []
        return f"{data}, with {' and '.join(also)}" if also else data


class Objective(ABC):
    """A frozen dataclass of hyper-parameters with one method. Registered in `t2i_align.objectives`.

    config: the file in `configs/` that shows a complete run.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    config: ClassVar[str]
    needs: ClassVar[Requirements]

    @abstractmethod
    def step(self, policy: Model, reference: Model, batch: Batch, draw: SampleRNG) -> tuple[Tensor, Metrics]:
        """Loss [B] with gradient through `policy`, and detached metrics [B] each to log under their names."""

    def initial_state(self) -> dict[str, float]:
        """Numbers that change from step to step, and their initial values (default: none); `step` has `batch.state`."""
        return {}

    def update_state(self, state: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next optimiser step's state.

        Separate from `step`, which sees one micro-batch of one process: `means` are the metrics averaged over all
        groups of the optimiser step, on all processes, so that the state does not depend on how a batch was split.
        """
        return dict(state)

    def fit_to_data(self, facts: DataStats) -> Self:
        """A copy with unset hyper-parameters estimated from the data (default: self)."""
        return self
