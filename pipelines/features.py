"""The denoiser's features: the output of its middle block, without the rest of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import Conditioning, Family, PipelineError


class FeaturesMixin(Family):
    def features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """What the denoiser computes at its `feature_block`, [B, ...]; the rest of it does not run.

        Gradients flow to `noisy_latents`, and to weights unless they are frozen. `denoiser` as in `predict`.
        """
        denoiser = denoiser or self.denoiser

        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            raise _StopForward(output[self.feature_output] if isinstance(output, tuple) else output)

        handle = denoiser.get_submodule(self.feature_block).register_forward_hook(stop)
        try:
            with uncompiled(denoiser):
                self.predict(noisy_latents, timesteps, conditioning, denoiser)
        except _StopForward as stopped:
            return stopped.output
        finally:
            handle.remove()
        raise PipelineError(f"the denoiser never ran its block {self.feature_block!r}")


class _StopForward(Exception):
    """Ends a forward pass at the block whose output is wanted."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


@contextmanager
def uncompiled(denoiser: nn.Module) -> Iterator[None]:
    """Run the denoiser uncompiled, since compiled code ignores hooks, and without gradient checkpointing.

    Checkpointing would run its blocks again in the backward pass, when an adapter that is off now may be on again.
    """
    checkpointed = [module for module in denoiser.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    compiled = getattr(denoiser, "_compiled_call_impl", None) is not None
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
