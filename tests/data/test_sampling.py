"""The sample stream: whatever cuts it, the same samples, each exactly once an epoch."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from t2i_align.data.sampling import Position, StreamSampler

sizes = st.integers(1, 13)


def steps(count: int, start: int, n: int, batch: int, world: int, accumulate: int) -> list[list[Position]]:
    """What each of `count` optimiser steps consumes over all processes."""
    ranks = [
        iter(StreamSampler(n, 7, start, batch, rank=rank, world=world, accumulate=accumulate)) for rank in range(world)
    ]
    return [[p for _ in range(accumulate) for rank in ranks for p in next(rank)] for _ in range(count)]


@given(n=sizes, batch=st.integers(1, 4), world=st.integers(1, 3), accumulate=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_cutting_does_not_change_the_samples(n: int, batch: int, world: int, accumulate: int) -> None:
    together = batch * world * accumulate
    whole = steps(5, 0, n, together, 1, 1)
    cut = steps(5, 0, n, batch, world, accumulate)
    assert [sorted(step) for step in cut] == [sorted(step) for step in whole]


@given(n=sizes, batch=sizes)
@settings(max_examples=60, deadline=None)
def test_each_epoch_has_each_group_once(n: int, batch: int) -> None:
    """Batches straddle epochs, so 3 n batches of `batch` are exactly 3 * batch epochs."""
    stream = [position for micro in islice(StreamSampler(n, 0, 0, batch), 3 * n) for position in micro]
    assert len(stream) == 3 * n * batch
    for epoch in range(3 * batch):
        part = stream[epoch * n : (epoch + 1) * n]
        assert {e for e, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(n))


def test_resume_continues_even_on_other_processes() -> None:
    whole = steps(6, 0, n=10, batch=4, world=2, accumulate=1)
    resumed = steps(3, 3, n=10, batch=2, world=1, accumulate=4)
    assert [sorted(step) for step in whole[3:]] == [sorted(step) for step in resumed]


def test_processes_take_neighbouring_slices() -> None:
    """Step 1 of G = 8 begins at position 8; micro-batch 1 of process 1 is 2 * (1 * 2 + 1) = 6 positions further."""
    sampler = StreamSampler(100, 3, 1, batch_size=2, rank=1, world=2, accumulate=2)
    assert list(islice(sampler, 2))[1] == [sampler.at(14), sampler.at(15)]


def test_order_depends_on_seed_and_epoch() -> None:
    first = [StreamSampler(50, 0, 0, 1).at(p)[1] for p in range(50)]
    assert first != list(range(50))
    assert first != [StreamSampler(50, 0, 0, 1).at(p)[1] for p in range(50, 100)]
    assert first != [StreamSampler(50, 1, 0, 1).at(p)[1] for p in range(50)]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_drives_a_data_loader(workers: int) -> None:
    """The endless stream works as `batch_sampler`, and worker processes do not change its order."""
    sampler = StreamSampler(5, 0, 0, batch_size=3)
    loader = DataLoader(_Echo(), batch_sampler=sampler, collate_fn=list, num_workers=workers)
    assert list(islice(iter(loader), 6)) == list(islice(sampler, 6))


def test_impossible_streams_are_refused() -> None:
    for bad in ({"n": 0}, {"batch_size": 0}, {"rank": 2, "world": 2}, {"accumulate": 0}, {"start_step": -1}):
        with pytest.raises(ValueError, match="not a stream"):
            StreamSampler(**{"n": 4, "seed": 0, "start_step": 0, "batch_size": 1, **bad})


class _Echo(torch.utils.data.Dataset[Position]):
    def __getitem__(self, position: Position) -> Position:
        return position
