"""Named weights of one network: what is trained, and what else the network can be while a block runs.

policy       the trained parameters
reference    what preference objectives compare with (see `reference`)
ema          the moving average of the policy

    with weights.using("reference") as denoiser:
        prediction = pipeline.predict(noisy_latents, timesteps, conditioning, denoiser=denoiser)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import cpu_offload
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from t2i_align.conditioning.personal import Personal
from t2i_align.errors import UserError
from t2i_align.training.sharding import exchanged, placed
from t2i_align.utils.tensors import tensors_hash, whole

CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # autocast rounds their weights at each call


@dataclass(frozen=True)
class Variant:
    """One set of weights.

    network: that has them, with `changes`: (owner, attribute, value), collected once, as a walk over the modules of a
    large network takes as long as many of its kernels. tensors: those that change during training, and so belong in a
    checkpoint, by the names of the trained parameters. replaced: the parameters that take their values, where these are
    sharded.
    """

    network: nn.Module
    changes: Sequence[tuple[object, str, Any]] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def using(self) -> Iterator[nn.Module]:
        """The network with these weights; afterwards everything is as it was, also after an exception."""
        before = [getattr(owner, name) for owner, name, _ in self.changes]
        try:
            for owner, name, value in self.changes:
                setattr(owner, name, value)
            own = [self.tensors[name] for name in self.replaced]
            with exchanged(list(self.replaced.values()), own) if own else nullcontext():
                yield self.network
        finally:
            for (owner, name, _), value in zip(self.changes, before, strict=True):
                setattr(owner, name, value)


class Weights:
    """The weights of a network by name. policy: its trained parameters."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.policy = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.variants = {"policy": Variant(network)}

    @property
    def result(self) -> str:
        """The name of the weights that are validated and saved in the end."""
        return "ema" if "ema" in self.variants else "policy"

    def using(self, name: str) -> AbstractContextManager[nn.Module]:
        """The network under these weights while the block runs.

        The policy's parameters are never written, so this is safe between its forward pass and its backward pass.
        """
        if name not in self.variants:
            raise RuntimeError(f"no {name} weights are kept: does the objective declare in its `needs` what it uses?")
        return self.variants[name].using()

    @torch.no_grad()
    def overwrite(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy these tensors into a variant that has its own."""
        for key, tensor in self.variants[name].tensors.items():
            tensor.copy_(tensors[key])

    @contextmanager
    def gathered(self, *, keep: bool, everything: bool = False) -> Iterator[None]:
        """Inside, `using(self.result)` has whole tensors in CPU memory in place of sharded ones, to be saved.

        All processes enter it together. keep: this one saves. everything: not only what is trained.
        """
        name, policy = self.result, dict(self.network.named_parameters()) if everything else self.policy
        tensors = {**policy, **self.variants[name].tensors}
        parts = {key: tensor.detach() for key, tensor in tensors.items() if isinstance(tensor, DTensor)}
        all_of = ((key, whole(part)) for key, part in parts.items())
        full = {key: nn.Parameter(tensor.cpu(), requires_grad=False) for key, tensor in all_of if keep}
        before = self.variants[name]
        self.variants[name] = Variant(self.network, in_place_of(self.network, full)) if full else before
        try:
            yield
        finally:
            self.variants[name] = before

    @cached_property
    def base_hash(self) -> str:
        """Of what the training starts from, when it is first asked: the frozen parameters, or all if none is frozen."""
        parameters = dict(self.network.named_parameters())
        frozen = {name: parameter for name, parameter in parameters.items() if name not in self.policy}
        return tensors_hash(frozen or parameters)

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
            tensor.copy_(placed(state[name], tensor))


def older_policy(weights: Weights) -> Variant:
    """The network without dropout and with other tensors in place of the trained ones, at first copies of these."""
    network = weights.network
    tensors = {name: nn.Parameter(p.detach().clone(), requires_grad=False) for name, p in weights.policy.items()}
    still = dropout_off(network).changes
    if any(isinstance(parameter, DTensor) for parameter in tensors.values()):
        return Variant(network, still, tensors, weights.policy)
    return Variant(network, [*in_place_of(network, tensors), *still], tensors)


def in_place_of(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[tuple[object, str, Any]]:
    """The changes that put parameters in the places of the network's own of these names."""
    places = [(*name.rpartition("."), parameter) for name, parameter in parameters.items()]
    return [(network.get_submodule(path), leaf, parameter) for path, _, leaf, parameter in places]


def adapters_off(network: nn.Module) -> Variant:
    """The network as its base model.

    Only the layers' private flag is flipped: peft's public toggle also changes `requires_grad`, which silently
    loses gradients when it runs between a forward and its backward pass.
    """
    switches = {BaseTunerLayer: "_disable_adapters", Personal: "off"}
    return Variant(
        network,
        [(m, switch, True) for m in network.modules() for kind, switch in switches.items() if isinstance(m, kind)],
    )


def dropout_off(network: nn.Module) -> Variant:
    """The network with nothing dropped at random; all else stays in training mode."""
    return Variant(network, [(m, "training", False) for m in network.modules() if isinstance(m, nn.Dropout)])


def frozen_copy(
    network: nn.Module, *, offload: bool = False, compile: bool = False, updated: bool = False,
    dtype: torch.dtype = torch.float32, shard: Callable[[nn.Module], None] | None = None,
) -> Variant:  # fmt: skip
    """A copy of the network without its adapters, on its device or in CPU memory and streamed there layer by layer.

    Args:
        compile: the policy is compiled, so the copy has to be: equal weights must give equal predictions.
        updated: it will be overwritten.
        dtype: that of autocast: what it would round to this at each call is kept so, in half the memory.
        shard: divides the copy among processes.
    """
    device = next(network.parameters()).device
    # In the policy's own mode, so that equal weights give equal predictions to the last bit.
    twin = copy.deepcopy(network).requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = True
        elif isinstance(module, Personal):
            module.off = True
        elif isinstance(module, CAST) and dtype != torch.float32:
            module.to(dtype)
    if shard:
        shard(twin)
    tensors = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    if offload:
        # What is streamed is read from here, so that it can be overwritten, too.
        state = {name: tensor.cpu() for name, tensor in twin.state_dict().items()}
        if device.type == "cuda":
            state = {name: tensor.pin_memory() for name, tensor in state.items()}  # several times faster to stream
        tensors = {name: state[name] for name in tensors}
        cpu_offload(twin, execution_device=device, state_dict=state)
    if compile:
        twin.compile()
    return Variant(twin, (), tensors if updated else {})
