"""What is watched while training: means of metrics, divergence, tensors without a gradient, and a user's callbacks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from t2i_align.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Called by the main process while a run trains.

    on_step: after each optimiser step, with its number, and the metrics where it was logged. on_validate: with the
    step, the scores and the samples [N, 3, H, W] or [N, F, 3, H, W]. on_save: with the step and the checkpoint folder.
    """

    on_step: Callable[[int, dict[str, float]], object] | None = None
    on_validate: Callable[[int, dict[str, float], Tensor], object] | None = None
    on_save: Callable[[int, Path], object] | None = None


class MetricAverager:
    """Sum and count, [2], of each metric's values that are not NaN; no host-device synchronisation."""

    def __init__(self, totals: Mapping[str, Tensor] | None = None) -> None:
        self.totals: dict[str, Tensor] = dict(totals or {})

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count metrics in, one number per group each, [B]."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        known = ~values.isnan()
        totals = torch.stack([torch.where(known, values, 0).sum(1), known.sum(1)], dim=1)
        self.merge(MetricAverager(dict(zip(metrics, totals, strict=True))))

    def merge(self, other: MetricAverager) -> None:
        """Count in what another one holds."""
        for name, total in other.totals.items():
            self.totals[name] = self.totals[name] + total if name in self.totals else total

    def reduced(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """All-reduced totals (mean over ranks), so that any rank can resume from them."""
        if not self.totals:
            return {}
        names = sorted(self.totals)
        totals = accelerator.reduce(torch.stack([self.totals[name] for name in names]), reduction="mean")
        return dict(zip(names, totals, strict=True))

    def means(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Each metric's mean over all processes; NaN where it applied to no group."""
        return {name: total[0] / total[1] for name, total in self.reduced(accelerator).items()}

    def numbers(self, accelerator: Accelerator) -> dict[str, float]:
        """The same as plain numbers, without the metrics that applied to no group. Waits for the device."""
        means = self.means(accelerator)
        values = torch.stack(list(means.values())).tolist() if means else []
        return {name: value for name, value in zip(means, values, strict=True) if value == value}


def arriving(numbers: Tensor) -> Callable[[], list[float]]:
    """Start to copy numbers to the host; the call waits for these, but for nothing that the device does after them."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    host, copied = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


class Diverged(Exception):
    """What was seen, and after which step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step} {what}")
        self.step = step


def check_finite(loss: float, norm: float, step: int) -> None:
    """Raise Diverged unless a step's loss and gradient norm are finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(step, f"is not finite (loss {loss}, gradient norm {norm})")


def check_winners(means: Mapping[str, float], step: int, max_error_rise: float | None) -> None:
    """Raise Diverged where the policy denoises the winners much worse than the reference or the initial model does.

    The loss also falls when both errors rise, the loser's faster; samples degrade anyway.
    """
    for name, difference, other in (
        ("error/chosen", "error/chosen_minus_reference", "the reference"),
        ("winners/error", "winners/rise", "the initial model"),
    ):
        error, rise = means.get(name), means.get(difference)
        if error is None or rise is None or max_error_rise is None:
            continue
        reference = error - rise
        if rise > max_error_rise * reference:
            raise Diverged(
                step,
                f"has winners that are denoised much worse than by {other} (mean error {error:.4g}, against "
                f"{reference:.4g}; health.max_error_rise allows {1 + max_error_rise:.4g} times as much)",
            )


def drifted(means: Mapping[str, float], max_drift: float | None) -> str:
    """Why the run ends here where the policy has drifted beyond its limit, else ""."""
    drift = means.get("drift", 0.0)
    if max_drift is None or drift <= max_drift:
        return ""
    return f"the policy has drifted from the reference by {drift:.4g}, beyond health.max_drift={max_drift:g}"


def check_reached(trained: Mapping[str, Tensor], processes: int) -> None:
    """Name the trained tensors that the first step's gradient did not reach; with several processes an error."""
    names = [name for name, parameter in trained.items() if parameter.grad is None]
    if not names:
        return
    message = f"{len(names)} of {len(trained)} trained tensors get no gradient, as {', '.join(names[:3])}"
    if processes > 1:  # each would wait for the others' gradients
        raise UserError(f"{message}; with several processes each trained tensor needs one: leave these out")
    logger.warning("%s; they stay as they are", message)
