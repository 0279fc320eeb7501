"""The optimiser."""

from __future__ import annotations

from typing import Any

import torch

from t2i_align.config import OptimConfig
from t2i_align.errors import UserError


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
