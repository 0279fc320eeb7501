"""Tallies of logged numbers."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from t2i_align.training.monitor import MetricAverager

NAN = math.nan


def test_means_skip_missing_values() -> None:
    """a: (1 + 3 + 8) / 3 = 4, and not the mean 5 of the micro-batches' means 2 and 8; b: always NaN; c: only 7."""
    tally, step = MetricAverager(), MetricAverager()
    step.add({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([NAN, NAN])})
    step.add({"a": torch.tensor([NAN, 8.0]), "b": torch.tensor([NAN, NAN])})
    tally.merge(step)
    tally.add({"c": torch.tensor([7.0])})
    accelerator = Accelerator(cpu=True)
    assert tally.numbers(accelerator) == {"a": 4.0, "c": 7.0}
    means = tally.means(accelerator)
    assert means["a"].item() == 4.0 and means["b"].isnan()


def test_empty_averager_has_no_means() -> None:
    assert MetricAverager().numbers(Accelerator(cpu=True)) == {}


def test_averager_continues_after_a_reduction() -> None:
    tally = MetricAverager()
    tally.add({"a": torch.tensor([1.0, 2.0])})
    again = MetricAverager(tally.reduced(Accelerator(cpu=True)))
    for each in (tally, again):
        each.add({"a": torch.tensor([6.0])})
        assert each.numbers(Accelerator(cpu=True))["a"] == pytest.approx(3.0)
