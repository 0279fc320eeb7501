"""Averages of logged metrics, and what ends a run."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from t2i_align.errors import UserError
from t2i_align.training.monitor import (
    Diverged,
    MetricAverager,
    check_finite,
    check_reached,
    check_winners,
    drifted,
)  # fmt: skip

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


@pytest.mark.parametrize(
    ("names", "other"),
    [
        (("error/chosen", "error/chosen_minus_reference"), "the reference"),
        (("winners/error", "winners/rise"), "the initial model"),
    ],
)
def test_winners_may_get_worse_by_the_allowed_share(names: tuple[str, str], other: str) -> None:
    """Error 0.75, 0.25 above the 0.5 of what it is compared with: a rise by 1/2."""
    means = dict(zip(names, (0.75, 0.25), strict=True))
    check_winners(means, 7, 0.5)
    check_winners(means, 7, None)
    check_winners({names[0]: 9.0}, 7, 0.1)
    check_winners(dict(zip(names, (0.1, -0.3), strict=True)), 7, 0.1)
    with pytest.raises(Diverged) as caught:
        check_winners(means, 7, 0.49)
    assert caught.value.step == 7 and str(caught.value) == (
        f"step 7 has winners that are denoised much worse than by {other} (mean error 0.75, against 0.5; "
        "health.max_error_rise allows 1.49 times as much)"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_and_gradient_must_be_finite(bad: float) -> None:
    check_finite(1.0, 2.0, 1)
    for numbers in ([bad, 1.0], [1.0, bad]):
        with pytest.raises(Diverged) as caught:
            check_finite(*numbers, 3)
        what = f"step 3 is not finite (loss {numbers[0]}, gradient norm {numbers[1]})"
        assert caught.value.step == 3 and str(caught.value) == what


def test_the_drift_may_reach_its_limit() -> None:
    assert not drifted({"drift": 9.0}, None) and not drifted({"drift": 0.5}, 0.5) and not drifted({}, 0.0)
    says = "the policy has drifted from the reference by 0.75, beyond health.max_drift=0.5"
    assert drifted({"drift": 0.75}, 0.5) == says


def test_tensors_without_a_gradient_are_named(caplog: pytest.LogCaptureFixture) -> None:
    trained = {name: torch.zeros(1, requires_grad=True) for name in "abcde"}
    trained["b"].grad = torch.zeros(1)
    what = "4 of 5 trained tensors get no gradient, as a, c, d"
    check_reached(trained, 1)
    assert caplog.messages == [f"{what}; they stay as they are"]
    with pytest.raises(UserError) as caught:
        check_reached(trained, 2)
    assert str(caught.value) == f"{what}; with several processes each trained tensor needs one: leave these out"
    check_reached({"b": trained["b"]}, 2)
