"""The loop that everything here is trained with: a cosine schedule, an exponential average, resumable checkpoints."""

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

from t2i_align.utils.files import atomic_file
from tools.testbed.muon import Muon

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Steps and learning rate; `every` steps lie between two checkpoints. `muon`: that optimiser instead of AdamW."""

    steps: int
    lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    every: int = 760
    muon: bool = False


def learning_rate(config: LoopConfig, step: int) -> float:
    """A linear warm-up under a cosine to zero."""
    return config.lr * min(1.0, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def fit(
    model: M,
    losses: Callable[[int], Mapping[str, Tensor]],
    config: LoopConfig,
    state_file: Path | None = None,
    on_checkpoint: Callable[[M, int], None] | None = None,
) -> M:
    """Train `model` in place and return its exponential average, continuing from `state_file` where that exists.

    Args:
        losses: the named losses of a step, whose sum is minimised; must depend on the step's number only.
        on_checkpoint: called with the average and the number of steps done after each checkpoint.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser: torch.optim.Optimizer = Muon(parameters, config.lr)
    if not config.muon:
        optimiser = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts: dict[str, nn.Module | torch.optim.Optimizer] = {"model": model, "average": average, "optimiser": optimiser}
    first = 0
    if state_file and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    begin, log = time.time(), []
    for step in range(first, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        terms = losses(step)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            decay = min(config.ema, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
        log.append({name: term.detach() for name, term in terms.items()})
        done = step + 1
        if done % 100 == 0:
            means = {name: torch.stack([entry[name] for entry in log]).mean() for name in log[0]}
            log.clear()
            shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"step {done}/{config.steps} {shown} {time.time() - begin:.0f} s", flush=True)
        if done % config.every == 0 or done == config.steps:
            if state_file:
                with atomic_file(state_file) as temporary:
                    torch.save({**{name: part.state_dict() for name, part in parts.items()}, "step": done}, temporary)
            if on_checkpoint is not None:
                on_checkpoint(average, done)
    return average


def has_bf16() -> bool:
    """Whether this CPU has bf16 instructions. Emulated, a training step takes ten times as long as in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def mixed(enabled: bool = True) -> torch.autocast:
    """Autocast to bf16 where that is faster than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled and has_bf16())
