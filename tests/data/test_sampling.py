"""The order of samples: whatever cuts it, the same samples, each exactly once an epoch; steps of one bucket."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_align.data.loader import micro_batches, steps

sizes = st.integers(1, 13)
Positions = list[list[tuple[int, int]]]


def taken(
    count: int, start: int, groups: np.ndarray, batch: int, world: int = 1, accumulate: int = 1,
    buckets: np.ndarray | None = None,
) -> Positions:  # fmt: skip
    """What each of `count` optimiser steps takes over all processes."""
    ranks = []
    for rank in range(world):
        ordered = steps(groups, buckets, seed=7, size=batch * world * accumulate, start=start)
        ranks.append(micro_batches(ordered, batch, accumulate, rank, world))
    return [[position for _ in range(accumulate) for rank in ranks for position in next(rank)] for _ in range(count)]


@given(n=sizes, batch=st.integers(1, 4), world=st.integers(1, 3), accumulate=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_cutting_and_resuming_do_not_change_the_samples(n: int, batch: int, world: int, accumulate: int) -> None:
    whole = taken(6, 0, np.arange(n), batch * world * accumulate)
    assert taken(6, 0, np.arange(n), batch, world, accumulate) == whole
    assert taken(3, 3, np.arange(n), batch, world, accumulate) == whole[3:]


@given(n=sizes, batch=sizes)
@settings(max_examples=60, deadline=None)
def test_each_epoch_has_each_group_once(n: int, batch: int) -> None:
    """Batches straddle epochs, so 3 n batches of `batch` are exactly 3 * batch epochs."""
    groups = np.arange(n) * 10
    stream = [position for micro in taken(3 * n, 0, groups, batch) for position in micro]
    assert len(stream) == 3 * n * batch
    for epoch in range(3 * batch):
        part = stream[epoch * n : (epoch + 1) * n]
        assert {e for e, _ in part} == {epoch} and sorted(group for _, group in part) == groups.tolist()


def test_order_depends_on_seed_and_epoch() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return [group for _, group in next(steps(np.arange(50), seed=seed, size=50, start=number))]

    first = epoch(0, seed=0)
    assert first != list(range(50)) and first != epoch(1, seed=0) and first != epoch(0, seed=1)


def test_groups_of_a_seed_come_as_they_always_have() -> None:
    """A change here would change the samples of every run that is resumed after an update."""
    ordered = steps(np.arange(7), seed=3, size=4)
    assert list(islice(ordered, 2)) == [[(0, 3), (0, 5), (0, 1), (0, 2)], [(0, 4), (0, 0), (0, 6), (1, 3)]]


def test_one_process_takes_whole_steps_in_micro_batches() -> None:
    assert list(micro_batches(iter([[3, 1], [0, 2]]), 2)) == [[3, 1], [0, 2]]
    assert list(micro_batches(iter([[3, 1, 0, 2]]), 1, accumulate=4)) == [[3], [1], [0], [2]]
    assert list(micro_batches(iter([[3, 1, 0, 2]]), 1, 2, rank=1, world=2)) == [[1], [2]]


@pytest.mark.parametrize("cut", [(1, 1, 4), (4, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_a_step_is_of_one_bucket_however_it_is_cut(cut: tuple[int, int, int]) -> None:
    """Steps of four groups: the same for any batch size, processes and accumulation, and resumed at any of them."""
    groups, buckets = np.arange(50), np.random.default_rng(0).integers(0, 3, 50)
    plain = taken(60, 0, groups, 4, buckets=buckets)
    assert taken(60, 0, groups, *cut, buckets=buckets) == plain
    assert taken(5, 23, groups, *cut, buckets=buckets) == plain[23:28]
    assert all(len({buckets[group] for _, group in step}) == 1 for step in plain)
    seen = [position for step in plain for position in step]
    assert len(set(seen)) == len(seen) and {group for epoch, group in seen if epoch == 0} == set(range(50))
