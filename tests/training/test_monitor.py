"""Averages of logged metrics."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from t2i_align.training.monitor import MetricAverager

NAN = math.nan


def test_means_leave_out_missing_values() -> None:
    """a: (1 + 3 + 8) / 3 = 4, and not the mean 5 of the micro-batches' means 2 and 8; b: always missing; c: only 7."""
    average, step = MetricAverager(), MetricAverager()
    step.add({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([NAN, NAN])})
    step.add({"a": torch.tensor([NAN, 8.0]), "b": torch.tensor([NAN, NAN])})
    average.merge(step)
    average.add({"c": torch.tensor([7.0])})
    accelerator = Accelerator(cpu=True)
    assert average.numbers(accelerator) == {"a": 4.0, "c": 7.0}
    means = average.means(accelerator)
    assert means["a"].item() == 4.0 and means["b"].isnan()
    assert MetricAverager().numbers(accelerator) == {}


def test_average_continues_from_reduced_totals() -> None:
    average = MetricAverager()
    average.add({"a": torch.tensor([1.0, 2.0])})
    again = MetricAverager(average.reduced(Accelerator(cpu=True)))
    for each in (average, again):
        each.add({"a": torch.tensor([6.0])})
        assert each.numbers(Accelerator(cpu=True))["a"] == pytest.approx(3.0)
