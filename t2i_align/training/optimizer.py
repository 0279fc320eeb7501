"""The optimiser of a run, and whether this machine can train as the run asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import get_available_trackers

from t2i_align.config import OptimConfig, RunConfig
from t2i_align.errors import UserError

if TYPE_CHECKING:
    from t2i_align.reward_models.config import ScorerRun


def check_machine(config: RunConfig | ScorerRun) -> None:
    """Raise UserError for a precision that this machine cannot train in, or a package that is not installed."""
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision 'fp16' needs a CUDA GPU; use 'bf16' or 'fp32'")
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.log.trackers:
        if tracker not in installed:
            raise UserError(f"log.trackers {tracker!r} is not installed: pip install {tracker}")
    make_optimizer(config.optim, [torch.nn.Parameter(torch.zeros(1))])


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
