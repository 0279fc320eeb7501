"""Means of logged numbers, each over the groups to which it applies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class MetricAverager:
    """Sum and count, [2], of each metric's values that are not NaN; nothing here waits for the device."""

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
        """The totals as the average process has them, so that every process can go on from them after a restart."""
        if not self.totals:
            return {}
        names = sorted(self.totals)
        totals = accelerator.reduce(torch.stack([self.totals[name] for name in names]), reduction="mean")
        return dict(zip(names, totals, strict=True))

    def means(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Each metric's mean over all processes; NaN where it applied to no group."""
        return {name: total[0] / total[1] for name, total in self.reduced(accelerator).items()}

    def numbers(self, accelerator: Accelerator) -> dict[str, float]:
        """The same as plain numbers, which waits for the device; without the metrics that applied to no group."""
        means = self.means(accelerator)
        values = torch.stack(list(means.values())).tolist() if means else []
        return {name: value for name, value in zip(means, values, strict=True) if value == value}
