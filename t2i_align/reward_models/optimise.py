"""Over-optimisation on the testbed: the oracle's reward of images while a scorer is optimised ever harder.

Best of n: of n drawn images the scorer's favourite (arXiv 2210.10760), with KL(n) = log n - (n - 1) / n to the pool.
Ascent: steps up the scorer's gradient on a good image's pixels, the attack that direct reward fine-tuning is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reward_scorers import Scorer
from t2i_align.evaluation.stats import interval
from t2i_align.testbed.captions import draw_image, draw_wrong, parse
from t2i_align.testbed.oracle import Oracle

POOL = 64  # images of a prompt
WRONG, DEGRADED = 0.6, 0.6  # shares of a pool with one attribute wrong, and with their quality spoilt
STEPS, STEP_SIZE = 60, 2 / 255  # of the ascent: signed steps, in units of the pixel range


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Means over prompts while optimisation goes on. x: n or steps; proxy: in spreads of the pool from its mean.

    oracle: its reward, with 95 % intervals over prompts (`evaluation.stats`). gap: how much more the proxy has gained
    than the oracle, both in their own spreads. kl: of best of n.
    """

    kind: str
    x: list[int]
    proxy: list[float]
    oracle: list[float]
    low: list[float]
    high: list[float]
    gap: list[float]
    kl: list[float] | None = None


@dataclass(frozen=True)
class Pool:
    """Drawn images [P, N, 3, 64, 64] of prompts [P], and the oracle's rewards [P, N] of them."""

    prompts: Sequence[str]
    pixels: Tensor
    rewards: NDArray[np.float64]


def draw_pool(prompts: Sequence[str], size: int = POOL, seed: int = 0) -> Pool:
    """Images of each prompt: some right, some with an attribute wrong, some blurred, faded or mottled."""
    pixels = []
    for number, prompt in enumerate(prompts):
        statement, rng = parse(prompt), np.random.default_rng((seed, number))
        for _ in range(size):
            drawn = draw_wrong(statement, rng) if rng.random() < WRONG else statement
            pixels.append(torch.from_numpy(draw_image(drawn, rng, DEGRADED)).permute(2, 0, 1))
    stacked = torch.stack(pixels).float().clamp(0, 1).unflatten(0, (len(prompts), size))
    repeated = [prompt for prompt in prompts for _ in range(size)]
    return Pool(prompts, stacked, Oracle().judge(stacked.flatten(0, 1), repeated).reward.reshape(-1, size))


def curves(scorer: Scorer, pool: Pool, batch_size: int) -> list[Curve]:
    """Best of n, and ascent where gradients flow."""
    scores = score_pool(scorer, pool, max(batch_size, 64))
    best = best_of_n_curve(scores, pool)
    return [best, ascent_curve(scorer, scores, pool, max(batch_size, 32))] if scorer.differentiable else [best]


def best_of_n(proxy: NDArray, rewards: NDArray, n: int) -> tuple[NDArray, NDArray]:
    """Expected proxy and reward of the proxy's favourite among n of a pool's N, [P] each, without drawing any.

    Sorted best first, the i-th is the favourite of C(N - i, n - 1) of the C(N, n) choices (i from 1).
    """
    size = proxy.shape[1]
    order = np.argsort(-proxy, axis=1, kind="stable")
    chance = np.array([math.comb(size - i, n - 1) for i in range(1, size + 1)], dtype=float) / math.comb(size, n)
    taken = [np.take_along_axis(values, order, 1) @ chance for values in (proxy, rewards)]
    return taken[0], taken[1]


def best_of_n_curve(scores: NDArray, pool: Pool) -> Curve:
    """n = 1, 2, 4 ... up to the pool's size, of its scores [P, N]."""
    sizes = [2**power for power in range(int(math.log2(scores.shape[1])) + 1)]
    proxies, rewards = zip(*(best_of_n(scores, pool.rewards, n) for n in sizes), strict=True)
    curve = _curve("best of n", sizes, proxies, rewards, scores, pool)
    return replace(curve, kl=[math.log(n) - (n - 1) / n for n in sizes])


def ascent_curve(scorer: Scorer, scores: NDArray, pool: Pool, batch_size: int) -> Curve:
    """From each prompt's first right image (or its best): signed steps, evaluated by the oracle every few steps."""
    start = pool.rewards.argmax(1)
    pixels = pool.pixels[torch.arange(len(start)), torch.from_numpy(start)].clone()
    oracle, steps, proxies, rewards = Oracle(), [], [], []
    for step in range(STEPS + 1):
        climbed, gradients = [], []
        for first in range(0, len(pixels), batch_size):
            batch = pixels[first : first + batch_size].clone().requires_grad_()
            score = scorer.score(batch, pool.prompts[first : first + batch_size])
            gradients.append(torch.autograd.grad(score.sum(), batch)[0].cpu())
            climbed.append(score.detach().cpu())
        if step % max(1, STEPS // 12) == 0:
            steps.append(step)
            proxies.append(torch.cat(climbed).double().numpy())
            rewards.append(oracle.judge(pixels, pool.prompts).reward)
        pixels = (pixels + STEP_SIZE * torch.cat(gradients).sign()).clamp(0, 1)
    return _curve("ascent", steps, proxies, rewards, scores, pool)


@torch.no_grad()
def score_pool(scorer: Scorer, pool: Pool, batch_size: int) -> NDArray[np.float64]:
    """Scores [P, N]."""
    pixels = pool.pixels.flatten(0, 1)
    prompts = [prompt for prompt in pool.prompts for _ in range(pool.pixels.shape[1])]
    starts = range(0, len(pixels), batch_size)
    scores = [scorer.score(pixels[i : i + batch_size], prompts[i : i + batch_size]).cpu() for i in starts]
    return torch.cat(scores).double().numpy().reshape(pool.rewards.shape)


def _curve(
    kind: str, x: list[int], proxies: Sequence[NDArray], rewards: Sequence[NDArray], scores: NDArray, pool: Pool
) -> Curve:
    """Means over prompts of scores and rewards [P] at each x, in spreads of the pool's `scores` and rewards [P, N]."""
    proxy = (np.mean(proxies, 1) - scores.mean()) / max(scores.std(), 1e-12)
    oracle = np.mean(rewards, 1)
    ones = np.ones(len(pool.prompts))
    low, high = zip(*(interval(np.arange(len(ones)), reward, ones) for reward in rewards), strict=True)
    gap = proxy - proxy[0] - (oracle - oracle[0]) / max(pool.rewards.std(), 1e-12)
    means = {"proxy": proxy.tolist(), "oracle": oracle.tolist(), "gap": gap.tolist()}
    return Curve(kind=kind, x=x, low=list(low), high=list(high), **means)
