"""What a run needs of the machine and of optional packages: optimisers, precision, trackers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import get_available_trackers

from t2i_align.errors import UserError
from t2i_align.utils.distributed import Distributed

if TYPE_CHECKING:
    from t2i_align.config import RunConfig
    from t2i_align.reward_models.config import ScorerRun
    from t2i_align.training.sections import OptimConfig

# Those that are not torch's own: where they are found, and the extra that brings them.
OTHERS = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "adamw8bit_torchao": ("torchao.optim", "AdamW8bit", "torchao"),
    "prodigy": ("pytorch_optimizer", "Prodigy", "optimizers"),
    "lion": ("pytorch_optimizer", "Lion", "optimizers"),
}


def check_machine(config: RunConfig | ScorerRun) -> None:
    """Raise UserError for a precision that this machine cannot train in, or a package that is not installed."""
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision 'fp16' needs a CUDA GPU; use 'bf16' or 'fp32'")
    if getattr(config.train, "offload", None) == "base" and (found := Distributed().world) > 1:
        raise UserError(f"train.offload=base is for one process, found {found}; use 'encoders', or train.shard=true")
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.log.trackers:
        if tracker not in installed:
            raise UserError(f"log.trackers {tracker!r} is not installed: pip install {tracker}")
    make_optimizer(config.optim, [torch.nn.Parameter(torch.zeros(1))])


def make_optimizer(config: OptimConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser: torch's AdamW, fused where it can, or Adafactor; others from optional packages."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":  # has no first moment, and so no betas
        return torch.optim.Adafactor(parameters, **options)
    options["betas"] = tuple(config.betas)
    if config.optimizer not in OTHERS:
        return torch.optim.AdamW(parameters, fused=True, **options)
    module, name, extra = OTHERS[config.optimizer]
    try:
        optimizer: torch.optim.Optimizer = getattr(import_module(module), name)(parameters, **options)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"optim.optimizer {config.optimizer!r} needs {package}: pip install 't2i-align[{extra}]'"
        ) from error
    return optimizer
