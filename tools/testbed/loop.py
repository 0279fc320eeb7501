"""The loop every base is trained with: AdamW under a cosine, an exponential average, resumable checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast; `every` steps lie between two checkpoints."""

    steps: int
    lr: float = 1e-3
    ema: float = 0.999
    every: int = 760


def learning_rate(config: LoopConfig, step: int) -> float:
    """A linear warm-up over 200 steps under a cosine to zero."""
    return config.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def fit(
    model: M,
    losses: Callable[[int], Mapping[str, Tensor]],
    config: LoopConfig,
    state_file: Path,
    on_checkpoint: Callable[[M, int], None] | None = None,
    optimiser: torch.optim.Optimizer | None = None,
) -> M:
    """Train `model` and return its exponential average, continuing from `state_file` where that exists.

    Args:
        losses: the named losses of a step, whose sum is minimised; must depend on the step's number only.
        on_checkpoint: called with the average and the number of steps done after each checkpoint.
        optimiser: of the model's parameters; AdamW by default.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = optimiser or torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    begin, log = time.time(), []
    for step in range(first, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        parts = losses(step)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            decay = min(config.ema, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
        log.append({name: part.detach() for name, part in parts.items()})
        done = step + 1
        if done % 100 == 0:
            means = {name: torch.stack([entry[name] for entry in log]).mean() for name in log[0]}
            log.clear()
            shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"step {done}/{config.steps} {shown} {time.time() - begin:.0f} s", flush=True)
        if done % config.every == 0 or done == config.steps:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save({**state, "step": done}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
            if on_checkpoint is not None:
                on_checkpoint(average, done)
    return average
