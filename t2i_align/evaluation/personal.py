"""How well a model serves its users: win rates over users and prompts, and whom an embedding belongs to.

Each user judges the images made for them. The intervals are over other users and other prompts: both are drawn with
replacement, independently (the pigeonhole bootstrap, Owen 2007), as all users judge images of the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from t2i_align.conditioning import personal
from t2i_align.errors import UserError
from t2i_align.evaluation.stats import RESAMPLES, TAIL, Interval, interval, outcomes

if TYPE_CHECKING:
    from pipelines import TrainablePipeline

Judge = Callable[[str, Tensor, Sequence[str]], NDArray[np.float64]]  # user, images, prompts -> how much they are liked


@dataclass(frozen=True, kw_only=True)
class UserRate:
    """A win rate over users and prompts with its 95 % interval, and each user's own [users]."""

    rate: float
    interval: Interval
    by_user: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.interval[0]:.1%}, {self.interval[1]:.1%}]"


def liked(
    pipeline: TrainablePipeline,
    users: Mapping[str, Tensor | None],
    prompts: Sequence[str],
    seeds: Sequence[int],
    judge: Judge,
    *,
    scale: float = 1.0,
    **sampling: Any,
) -> NDArray[np.float64]:
    """How much each user likes the image of each prompt that is made for them, [users, prompts].

    Args:
        users: their tokens (see `inference.users.tokens_of`), or None for an image that is made for nobody.
        seeds: one for each prompt, the same for all users, so that models are compared pair by pair.
        scale: of the personal branch. sampling: more of `TrainablePipeline.generate`.
    """
    guided = pipeline.sampling(guidance=sampling.get("guidance"))[1] > 1 and not pipeline.distilled_guidance
    nobody: Tensor | None = None
    rows = []
    for user, tokens in users.items():
        if tokens is not None:
            with personal.serving(pipeline.denoiser, tokens, guided=guided, scale=scale):
                pixels = pipeline.generate(prompts, seeds, **sampling)
        else:
            pixels = nobody = pipeline.generate(prompts, seeds, **sampling) if nobody is None else nobody
        rows.append(np.asarray(judge(user, pixels, prompts), float))
    return np.stack(rows)


def win_rate(
    before: NDArray[np.float64], after: NDArray[np.float64], *, margin: float = 0.0, seed: int = 0
) -> UserRate:
    """How often users prefer the one to the other; ties are half a win.

    before, after: scores [users, prompts], or [runs, users, prompts] of several training seeds, which are averaged.

    Raises:
        UserError: shapes that differ, or fewer than two users or prompts.
    """
    if before.shape != after.shape or before.ndim not in (2, 3) or min(before.shape[-2:]) < 2:
        raise UserError(f"scores: expected two arrays of users x prompts, found {before.shape} and {after.shape}")
    won = outcomes(before, after, margin=margin)
    won = won.mean(0) if won.ndim == 3 else won
    return UserRate(rate=float(won.mean()), interval=crossed_interval(won, seed), by_user=tuple(won.mean(1)))


def crossed_interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """95 % interval of the mean of values [users, prompts] over other users and other prompts."""
    rng = np.random.default_rng(seed)
    users, prompts = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in values.shape)
    low, high = np.quantile(np.einsum("ru,up,rp->r", users, values, prompts, optimize=True), [1 - TAIL, TAIL])
    return float(low), float(high)


def identification(embeddings: Sequence[Tensor], top: int = 1) -> tuple[float, Interval]:
    """How often an embedding is among the `top` nearest of its own user, by cosine, and the interval over users.

    embeddings: of each user some, [m, ...], m of 2 or more, of disjoint choices. Each is compared with the mean of the
    user's others and with the means of all other users.
    """
    unit = [normalize(one.flatten(1).double(), dim=1) for one in embeddings]
    means = torch.stack([one.mean(0) for one in unit])
    hits: list[float] = []
    owner: list[int] = []
    for user, own in enumerate(unit):
        for row in own:
            others = means.clone()
            others[user] = (own.sum(0) - row) / (len(own) - 1)
            similar = normalize(others, dim=1) @ row
            hits.append(float((similar > similar[user]).sum() < top))
            owner.append(user)
    values = np.array(hits)
    return float(values.mean()), interval(np.array(owner), values, np.ones_like(values), share=True)
