"""The contract of an objective: what it needs, and one step from noised candidates to a loss per group.

Symbols, the same in every file: `err` is the per-sample mean squared difference between prediction and target in
float32, `_w` the preferred candidate, `_l` the other, `ref_` the reference's. `beta` is in the published
Diffusion-DPO convention: the logit is h = -1/2 beta (s_w - s_l) with s = err - ref_err.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.data.schema import COLUMNS, Column, Counts
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError

COMMANDS = {  # that make the columns
    "captions": "caption", "negative_caption": "perturb", "scores": "relabel", "segment_scores": "video segments",
}  # fmt: skip
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
    scorer: the objective has a `scorer`, and learns from prompts alone.
    uneven: how often the denoiser runs depends on the samples.
    """

    candidates: int = 1
    ties: bool = True
    likes_only: bool = False
    reference: bool = False
    features: bool = False
    lists: bool = False
    columns: tuple[str, ...] = ()
    scorer: bool = False
    uneven: bool = False

    def __str__(self) -> str:
        """One phrase for `t2i-align objectives`: the kind of data, its columns, the reference."""
        if self.scorer:
            return "prompts, with a scorer"
        if self.candidates > 1:
            data = "rankings" if self.lists else "pairs"
        else:
            data = "winners or liked images" if self.likes_only else "likes and dislikes, or groups"
        also = [name.replace("_", " ") for name in self.columns]
        also += ["a reference's features"] if self.features else ["a reference"] if self.reference else []
        return f"{data}, with {' and '.join(also)}" if also else data

    def places(self, k: int) -> Sequence[int]:
        """Which of a group's k candidates are passed, best first."""
        return (0, k - 1) if self.pairs else range(k)

    def check(self, found: Counts, path: str, *, alike: bool = True) -> None:
        """Check what a source at `path` holds that can be used, or what of it could be encoded.

        Args:
            alike: whether all groups that can be used must make one batch; not where a limit takes the first of them.

        Raises:
            UserError: none of the groups can serve the objective, a required column is missing, groups of different k.
        """
        if max(found.candidates) < self.candidates:
            raise UserError(
                f"{path}: the objective compares {self.candidates} candidates of a prompt, "
                f"but the groups here have {_listed(found.candidates)}"
            )
        for name in self.columns:
            self._check_column(name, found.columns[name], found.groups, path)
        ties, disliked, few = self.left_out(found).values()
        usable = found.candidates - (Counter() if self.ties else found.ties) - Counter({1: disliked})
        enough = {k: count for k, count in usable.items() if k >= self.candidates}
        if not enough:
            raise UserError(
                f"{path}: no group is left: of {found.groups}, {ties} are ties, {disliked} are disliked, "
                f"{few} have fewer than {self.candidates} candidates"
            )
        if alike:
            self.check_alike(enough, path)

    def check_alike(self, candidates: Mapping[int, int], path: str) -> None:
        """Raise UserError where groups cannot make one batch. candidates: number of groups by their k."""
        if len(candidates) > 1 and not self.pairs:
            raise UserError(
                f"{path}: for this objective, groups must have the same number of candidates, "
                f"found {_listed(candidates)}"
            )

    def left_out(self, found: Counts) -> dict[str, int]:
        """How many groups cannot be used, by the reason."""
        few = sum(count for k, count in found.candidates.items() if k < self.candidates)
        ties = sum(count for k, count in found.ties.items() if k >= self.candidates)
        return {
            "ties_left_out": 0 if self.ties else ties,
            "disliked_left_out": found.disliked if self.likes_only else 0,
            "too_few_candidates": few,
        }

    @property
    def pairs(self) -> bool:
        """Whether groups of any size give their best and their worst candidate."""
        return self.candidates == 2 and not self.lists

    @property
    def compared_texts(self) -> list[Column]:
        """The columns whose texts are compared: of pairs, both candidates' own; else one with the prompt."""
        columns = [COLUMNS[name] for name in self.columns if name in COLUMNS]
        return [column for column in columns if column.text and (self.pairs or not column.per_candidate)]

    def _check_column(self, name: str, having: int, groups: int, path: str) -> None:
        if having == groups or (name == "scores" and having):  # a scorer's numbers may happen to be 0 and 1 in some
            return
        what = f"{name!r} that are more than labels" if name == "scores" else repr(name)
        hint = f" `t2i-align {COMMANDS[name]}` makes it: name its file in data.annotations." if name in COMMANDS else ""
        raise UserError(
            f"{path}: the objective needs {what} with each group, but only {having} of {groups} groups have it.{hint}"
        )


class Objective(ABC):
    """A frozen dataclass of hyper-parameters with one method.

    Built-in ones are listed in `t2i_align.objectives.CLASSES`, others are named by their place, or by their name after
    `@t2i_align.objectives.register`. config: the file in `configs/` that shows a complete run.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    config: ClassVar[str] = ""
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

    def errors_key(self) -> str | None:
        """What the reference's errors depend on besides data and seed, for `train.store_reference`.

        None (default) where `step` needs more of the reference than `Noised.errors_against` gives.
        """
        return None

    def fit_to_data(self, facts: DataStats) -> Self:
        """A copy with unset hyper-parameters estimated from the data (default: self)."""
        return self


def _listed(candidates: Mapping[int, int]) -> str:
    return ", ".join(f"{k} candidate{'s' * (k > 1)} ({count} groups)" for k, count in sorted(candidates.items()))
