"""Whether a run is still healthy: what divergence looks like, and how far a step goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Diverged(Exception):
    """What was seen, and after which step."""

    def __init__(self, step: int, seen: str) -> None:
        super().__init__(f"step {step} {seen}")
        self.step = step


def check_finite(numbers: Tensor | None, step: int) -> None:
    """Raise Diverged unless a step's loss and gradient norm, [2], are finite. Waits for the device."""
    if numbers is not None and not bool(torch.isfinite(numbers).all()):
        loss, norm = numbers.tolist()
        raise Diverged(step, f"is not finite (loss {loss}, gradient norm {norm})")


def check_winners(means: Mapping[str, float], step: int, max_error_rise: float | None) -> None:
    """Raise Diverged where the policy denoises the winners much worse than the reference does.

    A preference loss is content when losers get worse faster than winners; the images are then lost all the same.
    Without a reference there is nothing to compare with, and nothing is checked.
    """
    rise = means.get("error/chosen_minus_reference")
    if rise is None or max_error_rise is None:
        return
    error = means["error/chosen"]
    reference = error - rise
    if rise > max_error_rise * reference:
        raise Diverged(
            step,
            f"has winners that are denoised much worse than by the reference (mean error {error:.4g}, the reference's "
            f"{reference:.4g}; health.max_error_rise allows {1 + max_error_rise:.4g} times as much)",
        )


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters as they are now."""
    return [parameter.detach().clone() for parameter in parameters]


def change(before: list[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The norm of what has been added to all parameters together; overwrites `before`, to need no third copy."""
    torch._foreach_sub_(before, [parameter.detach() for parameter in parameters])
    return torch.nn.utils.get_total_norm(before)
