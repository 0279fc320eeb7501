"""What a store checks of a family's conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from t2i_align.data.schema import Conditioning
from t2i_align.errors import UserError


def check_conditioning(conditioning: Conditioning, texts: Sequence[str], masks: Mapping[str, str]) -> None:
    """Raise UserError unless a family's conditioning of texts is tensors [B, ...], with the masks that it names."""
    for name, tensor in conditioning.items():
        if not isinstance(tensor, Tensor) or not tensor.ndim or len(tensor) != len(texts):
            kind = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(
                f"the conditioning {name!r} of {len(texts)} prompts, the first {texts[0]!r}, must be a tensor "
                f"[{len(texts)}, ...], found {kind}"
            )
    for name, mask in masks.items():
        if name not in conditioning:
            continue
        shape = list(conditioning[name].shape)
        found = list(conditioning[mask].shape) if mask in conditioning else None
        if found != shape[:2]:
            raise UserError(
                f"the mask {mask!r} of the conditioning {name!r} {shape} must be {shape[:2]}, found {found}, "
                f"for prompt {texts[0]!r}"
            )
