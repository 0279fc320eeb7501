"""Attention kernels by name."""

from __future__ import annotations

import torch
from diffusers.utils.import_utils import is_xformers_available

from pipelines.base import Family, PipelineError

# Of diffusers' attention dispatcher those that gradients pass: "sage" and "_flash_3" have no backward pass. The names
# in _hub fetch FlashAttention 2, or for Hopper GPUs 3, through the package kernels.
DISPATCHED_BACKENDS = ("native", "xformers", "flash", "flash_hub", "_flash_3_hub")


class AttentionMixin(Family):
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
        if backend != "native" and not torch.cuda.is_available():
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
