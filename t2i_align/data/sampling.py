"""Which sample comes when: an endless stream in which position p is item p % n of epoch p // n's permutation.

The stream knows neither batch size nor processes; those only cut it. So a run that is resumed, accumulated or spread
over other processes sees the same samples, each exactly once an epoch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count, islice

import torch
from torch.utils.data import Sampler

from t2i_align.diffusion.randomness import stable_seed

Position = tuple[int, int]  # (epoch, index)


class StreamSampler(Sampler[list[Position]]):
    """The micro-batches of one process, as a DataLoader's `batch_sampler`. Endless; batches may straddle epochs.

    One optimiser step consumes G = batch_size * accumulate * world consecutive positions; micro-batch m of process r
    takes the batch_size positions from step * G + (m * world + r) * batch_size on.

    Args:
        n: number of groups.
        seed: the run's seed; epoch e is permuted by (seed, "order", e).
        start_step: the optimiser step to begin with.
        batch_size: groups a micro-batch.
        rank, world: this process and how many there are.
        accumulate: micro-batches a step and process.
    """

    def __init__(
        self, n: int, seed: int, start_step: int, batch_size: int, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> None:
        if n < 1 or batch_size < 1 or accumulate < 1 or start_step < 0 or not 0 <= rank < world:
            raise ValueError(f"not a stream: {n=} {start_step=} {batch_size=} {rank=} {world=} {accumulate=}")
        self.n, self.seed, self.start_step = n, seed, start_step
        self.batch_size, self.rank, self.world, self.accumulate = batch_size, rank, world, accumulate
        self._order = lru_cache(maxsize=2)(self._permutation)  # a batch rarely touches more than two epochs

    def __iter__(self) -> Iterator[list[Position]]:
        stride = self.batch_size * self.world
        start = self.start_step * self.accumulate * stride + self.rank * self.batch_size
        while True:
            yield [self.at(position) for position in range(start, start + self.batch_size)]
            start += stride

    def at(self, position: int) -> Position:
        """(epoch, index) at a position of the stream."""
        epoch, place = divmod(position, self.n)
        return epoch, int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", epoch))
        return torch.randperm(self.n, generator=generator)


class BucketSampler(StreamSampler):
    """The same, with all groups of an optimiser step out of one bucket.

    The stream is dealt out to its buckets, and a bucket that has G groups makes the next step; what it has at an
    epoch's end is filled up from the next. So the steps depend on G only, and not on how a step is cut.

    Args:
        buckets: the bucket of each of the n groups.
    """

    def __init__(
        self,
        buckets: Sequence[int],
        seed: int,
        start_step: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        super().__init__(len(buckets), seed, start_step, batch_size, rank, world, accumulate)
        self.buckets = buckets

    def __iter__(self) -> Iterator[list[Position]]:
        for step in islice(self._steps(), self.start_step, None):
            for micro in range(self.accumulate):
                start = (micro * self.world + self.rank) * self.batch_size
                yield step[start : start + self.batch_size]

    def _steps(self) -> Iterator[list[Position]]:
        waiting: defaultdict[int, list[Position]] = defaultdict(list)
        size = self.batch_size * self.world * self.accumulate
        for position in count():
            epoch, index = self.at(position)
            bucket = int(self.buckets[index])
            waiting[bucket].append((epoch, index))
            if len(waiting[bucket]) == size:
                yield waiting.pop(bucket)
