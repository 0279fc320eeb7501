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
    """Statistics that open hyper-parameters are estimated from. score_range: minimum and maximum score of the data."""

    score_range: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What an objective needs of data and reference; checked before anything loads.

    candidates: minimum number per group. With 2, larger groups give their best and worst, unless `lists`.
    ties: whether groups whose best and worst score are equal contribute to the loss.
    likes_only: single samples with a negative score are left out.
    reference: the reference is called. features: `reference.features` is called.
    lists: whole groups are passed. columns: optional columns (`schema.COLUMNS`) that the batch must have.
    """

    candidates: int = 1
    ties: bool = True
    likes_only: bool = False
    reference: bool = False
    features: bool = False
    lists: bool = False
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One phrase for `t2i-align objectives`: the kind of data, its columns, the reference."""
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
    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
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
