"""The reference model that preference objectives measure against. It never carries gradients.

adapter_off      the policy's own weights with its LoRA switched off: no second model in memory
copy             a frozen copy of the denoiser as it was before training
offloaded_copy   the same copy kept in CPU memory and streamed to the device layer by layer
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import cpu_offload
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from t2i_align.data.schema import Conditioning, Model
from t2i_align.errors import UserError

if TYPE_CHECKING:
    from pipelines import TrainablePipeline


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser is its base model; afterwards everything is as it was, also after an exception.

    Only the layers' private flag is flipped: peft's public toggle also changes `requires_grad`, which silently
    loses gradients when it runs between a forward and its backward pass.
    """
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def choose_kind(kind: str, *, lora: bool) -> str:
    """What `auto` stands for.

    Raises:
        UserError: `adapter_off` without a LoRA.
    """
    if kind == "auto":
        return "adapter_off" if lora else "copy"
    if kind == "adapter_off" and not lora:
        raise UserError("train.reference 'adapter_off' needs a LoRA; use 'copy' or 'offloaded_copy' without one")
    return kind


def no_reference(noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Stands in where the objective's `needs` declare none, so that no second denoiser is kept for nothing."""
    raise RuntimeError("this objective asked a reference model, but its needs say that it has none")


def build_reference(
    kind: str, pipeline: TrainablePipeline, device: torch.device, *, lora: bool, compile: bool = False
) -> Model:
    """The reference callable. Build it from the base weights, before a checkpoint is loaded into the policy.

    Args:
        compile: the policy is compiled, so a copy has to be, too: equal weights must give equal predictions.

    Raises:
        UserError: `adapter_off` without a LoRA.
    """
    kind = choose_kind(kind, lora=lora)
    if kind == "adapter_off":
        return _without_grad(pipeline, lambda: pipeline.denoiser, adapters_off)
    # In the policy's own mode and precision, so that equal weights give equal predictions to the last bit.
    frozen = copy.deepcopy(pipeline.denoiser).requires_grad_(False)
    if lora:
        for module in frozen.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = True
    frozen = cpu_offload(frozen, execution_device=device) if kind == "offloaded_copy" else frozen.to(device)
    if compile:
        frozen.compile()
    return _without_grad(pipeline, lambda: frozen, None)


def _without_grad(pipeline: TrainablePipeline, denoiser: Callable[[], nn.Module], context: Callable | None) -> Model:
    @torch.no_grad()
    def reference(noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        model = denoiser()
        if context is None:
            return pipeline.predict(noisy_latents, timesteps, conditioning, denoiser=model)
        with context(model):
            return pipeline.predict(noisy_latents, timesteps, conditioning, denoiser=model)

    return reference
