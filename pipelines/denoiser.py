"""What a denoiser is asked for beside its prediction: an attention kernel, and the features of its middle block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.utils.import_utils import is_xformers_available
from torch import Tensor, nn

from pipelines.base import Conditioning, Family, PipelineError

# Of diffusers' attention dispatcher those that gradients pass: "sage" and "_flash_3" have no backward pass. The names
# in _hub fetch FlashAttention 2, or for Hopper GPUs 3, through the package kernels.
DISPATCHED_BACKENDS = ("native", "xformers", "flash", "flash_hub", "_flash_3_hub")


class DenoiserMixin(Family):
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
            features: Tensor = stopped.args[0]
            return features
        finally:
            handle.remove()
        raise PipelineError(f"the denoiser never ran its block {self.feature_block!r}")

    def unreached(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> set[str]:
        """Names of the denoiser's parameters on which `predict` does not depend, so that they get no gradient.

        Such is the text stream of a last joint block. It costs one forward pass.
        """
        denoiser = self.denoiser
        checkpointing = denoiser._supports_gradient_checkpointing and not denoiser.is_gradient_checkpointing
        if checkpointing:  # what the backward pass would need is not kept
            denoiser.enable_gradient_checkpointing()
        try:
            with all_trained(denoiser):
                found = reached(self.predict(noisy_latents, timesteps, conditioning))
        finally:
            if checkpointing:
                denoiser.disable_gradient_checkpointing()
        parameters = dict(denoiser.named_parameters())
        missing = {name for name, parameter in parameters.items() if parameter not in found}
        # No gradient is followed to quantised weights: they share the fate of their layer's bias, if there is one.
        quantised = {name for name in missing if hasattr(parameters[name], "__tensor_flatten__")}
        quantised |= {name for name in missing if not parameters[name].is_floating_point()}
        return {name for name in missing if name not in quantised or f"{name.removesuffix('weight')}bias" in missing}

    def set_attention(self, backend: str) -> None:
        """Choose the attention kernel by name; anything that would be silently ignored is refused.

        Raises:
            PipelineError: a backend that the family, the machine or the installation does not have.
        """
        if backend not in self.attention_backends:
            raise PipelineError(
                f"attention backend {backend!r} is not usable with {self.family}. "
                f"Choices: {', '.join(self.attention_backends)}."
            )
        if backend not in ("native", "math") and not torch.cuda.is_available():
            raise PipelineError(f"attention backend {backend!r} needs a CUDA GPU; use 'native'")
        if backend == "xformers" and not is_xformers_available():
            raise PipelineError("attention backend 'xformers' needs the package: pip install 't2i-align[xformers]'")
        if self.dispatches:  # also for "native": the dispatcher remembers the last choice of the whole process
            try:
                self.denoiser.set_attention_backend(backend)
            except (RuntimeError, ImportError, OSError) as error:
                raise PipelineError(f"attention backend {backend!r} cannot be used: {error}") from error
        elif backend == "xformers":
            self.denoiser.enable_xformers_memory_efficient_attention()
        elif backend == "math":  # plain matrix products: with few tokens the fused kernel's backward pass takes longer
            self.denoiser.set_attn_processor(AttnProcessor())
        elif "math" in self.attention_backends:  # undo an earlier choice; a user's own processors stay
            processors = self.denoiser.attn_processors.values()
            if all(type(own) in (AttnProcessor, XFormersAttnProcessor) for own in processors):
                self.denoiser.set_attn_processor(AttnProcessor2_0())


@contextmanager
def all_trained(network: nn.Module) -> Iterator[None]:
    """Inside, every floating-point parameter takes part in autograd."""
    frozen = [p for p in network.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        with torch.enable_grad():
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def reached(output: Any) -> set[Tensor]:
    """The leaves that the gradient of an output, a tensor or a list of them, reaches."""
    nodes = [tensor.grad_fn for tensor in ([output] if isinstance(output, Tensor) else output)]
    seen, found = set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [parent for parent, _ in node.next_functions]
    return found


class _StopForward(Exception):
    """Ends a forward pass at the block whose output is wanted: its argument."""


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
