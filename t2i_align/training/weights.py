"""Named weights of one network: what is trained, and what else the network can be while a block runs.

policy       the trained parameters
reference    what preference objectives compare with (see `reference`)
ema          the moving average of the policy

    with weights.using("reference") as denoiser:
        prediction = pipeline.predict(noisy_latents, timesteps, conditioning, denoiser=denoiser)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from t2i_align.errors import UserError


@dataclass(frozen=True)
class Variant:
    """One set of weights.

    using: gives the network under them. tensors: those that change during training, and so belong in a checkpoint, by
    the names of the trained parameters.
    """

    using: Callable[[], AbstractContextManager[nn.Module]]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Weights:
    """The weights of a network by name. policy: its trained parameters."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.policy = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.variants: dict[str, Variant] = {}

    @property
    def result(self) -> str:
        """The name of the weights that are validated and saved in the end."""
        return "ema" if "ema" in self.variants else "policy"

    def using(self, name: str) -> AbstractContextManager[nn.Module]:
        """The network under these weights while the block runs.

        The policy's parameters are never written, so this is safe between its forward pass and its backward pass.
        """
        if name == "policy":
            return nullcontext(self.network)
        if name not in self.variants:
            raise RuntimeError(f"no {name} weights are kept: does the objective declare in its `needs` what it uses?")
        return self.variants[name].using()

    @torch.no_grad()
    def overwrite(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy these tensors into a variant that has its own."""
        for key, tensor in self.variants[name].tensors.items():
            tensor.copy_(tensors[key])

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: the policy's under their own names, the others' as `ema.NAME`."""
        others = {f"{name}.{key}": t for name, variant in self.variants.items() for key, t in variant.tensors.items()}
        return {**self.policy, **others}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's tensors. Raises UserError if some are missing."""
        own = self.state()
        if missing := set(own) - set(state):
            raise UserError(f"the checkpoint lacks {len(missing)} trained tensors, as {min(missing)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])


def older_policy(weights: Weights) -> Variant:
    """The network with other tensors in place of the trained parameters, at first copies of these."""
    tensors = {name: nn.Parameter(p.detach().clone(), requires_grad=False) for name, p in weights.policy.items()}
    return Variant(partial(swapped, weights.network, tensors), tensors)


def frozen_copy(network: nn.Module, *, offload: bool, compile: bool, updated: bool) -> Variant:
    """A copy of the network without its adapters, on its device or in CPU memory and streamed there layer by layer.

    compile: the policy is compiled, so the copy has to be: equal weights must give equal predictions. updated: it will
    be overwritten.
    """
    device = next(network.parameters()).device
    # In the policy's own mode and precision, so that equal weights give equal predictions to the last bit.
    twin = copy.deepcopy(network).requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = True
    tensors = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    if offload:
        # What is streamed is read from here, so that it can be overwritten, too.
        state = {name: tensor.cpu() for name, tensor in twin.state_dict().items()}
        tensors = {name: state[name] for name in tensors}
        cpu_offload(twin, execution_device=device, state_dict=state)
    if compile:
        twin.compile()
    return Variant(lambda: nullcontext(twin), tensors if updated else {})


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[nn.Module]:
    """Inside, the network is its base model.

    Only the layers' private flag is flipped: peft's public toggle also changes `requires_grad`, which silently
    loses gradients when it runs between a forward and its backward pass.
    """
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    with changed((layer, "_disable_adapters", True) for layer in layers):
        yield network


@contextmanager
def swapped(network: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside, the network has these parameters and no dropout."""
    places = [(*name.rpartition("."), parameter) for name, parameter in parameters.items()]
    with changed((network.get_submodule(path), leaf, p) for path, _, leaf, p in places), dropout_off(network):
        yield network


def dropout_off(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, nothing is dropped at random; all else stays in training mode."""
    return changed((module, "training", False) for module in network.modules() if isinstance(module, nn.Dropout))


@contextmanager
def changed(attributes: Iterable[tuple[object, str, Any]]) -> Iterator[None]:
    """Inside, (owner, name, value) are set; afterwards everything is as it was, also after an exception."""
    attributes = list(attributes)
    before = [getattr(owner, name) for owner, name, _ in attributes]
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(attributes, before, strict=True):
            setattr(owner, name, value)
