"""Mixed precision on the CPU: bf16 where the processor computes in it, float32 where it would only emulate it."""

from __future__ import annotations

import torch


def has_bf16() -> bool:
    """Whether this CPU has bf16 instructions. Emulated, a training step takes ten times as long as in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def mixed(enabled: bool = True) -> torch.autocast:
    """Autocast to bf16 where that is faster."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled and has_bf16())
