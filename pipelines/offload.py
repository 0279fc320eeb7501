"""Weights that lie in CPU memory and pass through the device while they are used.

    by_groups   an encoder, through diffusers' group offloading, on CUDA with a stream that fetches ahead
    stream      a frozen denoiser under a trained adapter

diffusers' hooks exchange the data of a parameter in place. What autograd keeps of a convolution or a norm for the
backward pass is the parameter itself, and its data are in CPU memory again by then, so these hooks serve passes without
gradient only. `stream` puts a copy in the parameter's place while a layer runs: autograd keeps the copy, and gradient
checkpointing, which runs a block again before its backward pass, keeps the copies of one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn


def by_groups(network: Any, device: torch.device, *, ahead: bool) -> None:
    """Keep a network that takes no gradient in CPU memory; each layer is on the device while it runs.

    ahead: fetch the next layer meanwhile, on CUDA. The order of layers is learned from whole forward passes, which an
    autoencoder that only encodes never makes.
    """
    if hasattr(network, "_diffusers_hook"):
        return
    network.to("cpu")
    ahead = ahead and device.type == "cuda"
    apply_group_offloading(network, device, offload_type="leaf_level", use_stream=ahead, record_stream=ahead)


def streamable(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of a network's repeated blocks that are frozen; what is outside of these is small."""
    blocks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    layers = dict.fromkeys(layer for block in blocks for layer in block.modules())
    for layer in layers:
        if layer._parameters and not any(layer.children()) and not any(p.requires_grad for p in layer.parameters()):
            yield layer


def stream(network: nn.Module, device: torch.device | str) -> int:
    """Keep a network's `streamable` layers in CPU memory for good; returns the bytes. Anything else is left alone."""
    size = 0
    for layer in streamable(network):
        size += _Streamed(layer, torch.device(device)).size
    return size


class _Streamed:
    """The weights of one layer, in CPU memory, with copies on the device while its forward pass runs."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.device = device
        for parameter in layer.parameters():
            data = parameter.data.cpu()
            parameter.data = data.pin_memory() if device.type == "cuda" else data
        self.kept = dict(layer._parameters)
        self.size = sum(parameter.nbytes for parameter in layer.parameters())
        layer._apply = lambda *_, **__: layer  # type: ignore[method-assign]  # `network.to(device)` leaves it here
        layer.register_forward_pre_hook(self.fetch)
        layer.register_forward_hook(self.release, always_call=True)  # also where a recomputation stops early

    def fetch(self, layer: nn.Module, inputs: Any) -> None:
        for name, parameter in self.kept.items():
            if parameter is not None:  # a gradient can be followed through the copy
                layer._parameters[name] = parameter.to(self.device, non_blocking=True, copy=True)  # type: ignore

    def release(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        layer._parameters.update(self.kept)
