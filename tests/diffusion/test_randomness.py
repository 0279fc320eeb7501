"""Random numbers depend only on (seed, epoch, sample, name)."""

from __future__ import annotations

import pytest
import torch

from pipelines import RectifiedFlow
from t2i_align.diffusion.randomness import SampleRNG, stable_seed


def draw(seed: int, *keys: str) -> SampleRNG:
    return SampleRNG(seed, keys, RectifiedFlow())


def test_random_numbers_of_a_sample_do_not_depend_on_batch_or_order() -> None:
    together = draw(1, "0/a", "0/b", "0/c").normal("noise", (4, 5))
    alone = draw(1, "0/b").normal("noise", (4, 5))
    assert torch.equal(together[1:2], alone)
    assert torch.equal(draw(1, "0/c", "0/a").normal("noise", (4, 5)), together[[2, 0]])


@pytest.mark.parametrize("other", [draw(2, "0/a"), draw(1, "1/a"), draw(1, "0/b")])
def test_seed_epoch_and_sample_each_change_the_numbers(other: SampleRNG) -> None:
    assert not torch.equal(draw(1, "0/a").normal("noise", (8,)), other.normal("noise", (8,)))


def test_names_are_independent_streams_and_repeated_calls_are_equal() -> None:
    d = draw(1, "0/a")
    first = d.normal("noise", (8,))
    d.uniform("timestep")
    assert torch.equal(first, d.normal("noise", (8,)))
    assert not torch.equal(first, d.normal("other", (8,)))


def test_distributions_are_correct() -> None:
    d = draw(0, *(f"0/{i}" for i in range(4000)))
    normal, uniform = d.normal("noise", (4,)), d.uniform("timestep")
    assert normal.mean().abs() < 0.03 and abs(normal.std() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


def test_seeds_are_the_same_on_every_machine() -> None:
    assert stable_seed(0, "0/a", "noise") == 8267291244433586830
