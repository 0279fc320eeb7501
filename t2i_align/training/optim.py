"""The optimiser and the learning rate's schedule, by their names in a configuration."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from t2i_align.config import OptimConfig, RunConfig
from t2i_align.errors import UserError, unknown


def make_optimizer(config: OptimConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where torch can; or bitsandbytes' 8-bit AdamW, if that is installed."""
    options: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            message = "optim.optimizer 'adamw8bit' needs bitsandbytes: pip install 't2i-align[bitsandbytes]'"
            raise UserError(message) from error
        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def make_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's schedule, by its name in diffusers."""
    known = sorted({kind.value for kind in SchedulerType} - {"piecewise_constant"})  # which needs rules of its own
    if config.schedule not in known:
        raise unknown("optim.schedule", config.schedule, known)
    if config.schedule == "constant" and config.warmup_steps:
        raise UserError(
            f"optim.schedule 'constant' takes no warm-up, found optim.warmup_steps={config.warmup_steps}; "
            "use 'constant_with_warmup'"
        )
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def scale_rate(schedule: torch.optim.lr_scheduler.LambdaLR, factor: float) -> None:
    """Multiply the learning rate from here on. The schedule's own state and the optimiser's then hold the factor."""
    schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
    for group in schedule.optimizer.param_groups:
        group["lr"] *= factor


def check_optimizer(config: RunConfig) -> None:
    """Raise UserError where the optimizer or its schedule cannot be made, before anything long starts."""
    make_schedule(config.optim, make_optimizer(config.optim, [torch.nn.Parameter(torch.zeros(1))]), config.train.steps)
