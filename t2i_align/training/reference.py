"""The reference model that preference objectives measure against. It never carries gradients.

adapter_off      the policy's own weights with its LoRA switched off: no second model in memory
copy             a frozen copy of the denoiser as it was before training
offloaded_copy   the same copy kept in CPU memory and streamed to the device layer by layer

A reference that follows the policy (see `reference_update`) is one of the copies, whose weights are overwritten,
or, under a LoRA, the policy's own weights with an older copy of the LoRA's.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import cpu_offload
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from t2i_align.data.schema import Conditioning
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


@contextmanager
def dropout_off(denoiser: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped at random; all else stays in training mode."""
    active = [module for module in denoiser.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


class Reference(ABC):
    """A frozen model as objectives see it."""

    def __init__(self, pipeline: TrainablePipeline) -> None:
        self.pipeline = pipeline

    @torch.no_grad()
    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.ask(self.pipeline.predict, noisy_latents, timesteps, conditioning)

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the frozen denoiser sees in noisy latents, with gradients to these and to nothing else."""
        return self.ask(self.pipeline.features, noisy_latents, timesteps, conditioning)

    @abstractmethod
    def ask(self, method: Callable[..., Tensor], *inputs: object) -> Tensor:
        """What one of the pipeline's methods answers with `denoiser=` the frozen one."""


class AdapterOff(Reference):
    """The policy's own weights with its LoRA switched off."""

    def ask(self, method: Callable[..., Tensor], *inputs: object) -> Tensor:
        denoiser = self.pipeline.denoiser
        with adapters_off(denoiser):
            return method(*inputs, denoiser=denoiser)


class UpdatableReference(Reference):
    """A reference that can be given other weights. weights: by the names of the policy's trained parameters."""

    weights: dict[str, Tensor]

    @torch.no_grad()
    def overwrite(self, weights: Mapping[str, Tensor]) -> None:
        """Become a model with these weights, which are copied."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])


class FrozenCopy(UpdatableReference):
    """A copy of the denoiser on its device, or in CPU memory and streamed to the device layer by layer."""

    def __init__(self, pipeline: TrainablePipeline, device: torch.device, *, offload: bool, compile: bool) -> None:
        super().__init__(pipeline)
        # In the policy's own mode and precision, so that equal weights give equal predictions to the last bit.
        self.denoiser = copy.deepcopy(pipeline.denoiser).requires_grad_(False)
        for module in self.denoiser.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = True
        self.weights = {name: parameter.detach() for name, parameter in self.denoiser.to(device).named_parameters()}
        if offload:
            # What is streamed is read from here, so that it can be overwritten, too.
            state = {name: tensor.cpu() for name, tensor in self.denoiser.state_dict().items()}
            self.weights = {name: state[name] for name in self.weights}
            cpu_offload(self.denoiser, execution_device=device, state_dict=state)
        if compile:
            self.denoiser.compile()

    def ask(self, method: Callable[..., Tensor], *inputs: object) -> Tensor:
        return method(*inputs, denoiser=self.denoiser)


class OlderAdapter(UpdatableReference):
    """The policy's base with a LoRA of its own, put in for one call: the policy's is never written to."""

    def __init__(self, pipeline: TrainablePipeline) -> None:
        super().__init__(pipeline)
        named = pipeline.denoiser.named_parameters()
        self.weights = {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}
        self.around = _Around(pipeline.denoiser)

    def ask(self, method: Callable[..., Tensor], *inputs: object) -> Tensor:
        weights = {f"denoiser.{name}": tensor for name, tensor in self.weights.items()}
        with dropout_off(self.pipeline.denoiser):
            return functional_call(self.around, weights, (method, *inputs))


class _Around(nn.Module):
    """A module that hands its denoiser to a pipeline's method, for `functional_call`, which wants a module."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, method: Callable[..., Tensor], *inputs: object) -> Tensor:
        return method(*inputs, denoiser=self.denoiser)


def choose_kind(kind: str, *, lora: bool, moving: bool = False) -> str:
    """What `auto` stands for.

    Raises:
        UserError: `adapter_off` without a LoRA, or a copy under one that is to follow the policy.
    """
    if kind == "auto":
        return "adapter_off" if lora else "copy"
    if kind == "adapter_off" and not lora:
        raise UserError("train.reference 'adapter_off' needs a LoRA; use 'copy' or 'offloaded_copy' without one")
    if kind != "adapter_off" and lora and moving:
        raise UserError(f"train.reference {kind!r} with train.reference_update: under a LoRA use 'auto', which is free")
    return kind


def no_reference(noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Stands in where the objective's `needs` declare none, so that no second denoiser is kept for nothing."""
    raise RuntimeError("this objective asked a reference model, but its needs say that it has none")


def build_reference(
    kind: str,
    pipeline: TrainablePipeline,
    device: torch.device,
    *,
    lora: bool,
    compile: bool = False,
    moving: bool = False,
) -> Reference:
    """The reference. Build it from the base weights, before a checkpoint is loaded into the policy.

    Args:
        compile: the policy is compiled, so a copy has to be, too: equal weights must give equal predictions.
        moving: it must be `UpdatableReference`.

    Raises:
        UserError: see `choose_kind`.
    """
    kind = choose_kind(kind, lora=lora, moving=moving)
    if kind == "adapter_off":
        return OlderAdapter(pipeline) if moving else AdapterOff(pipeline)
    return FrozenCopy(pipeline, device, offload=kind == "offloaded_copy", compile=compile)
