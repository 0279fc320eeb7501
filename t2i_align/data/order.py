"""Which groups come when: a function of the seed alone, whatever the batch size, the processes and the history."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np

from t2i_align.diffusion.randomness import permutation


def steps(
    numbers: np.ndarray, buckets: np.ndarray | None = None, *, seed: int, size: int, start: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """(epoch, number) of the `size` groups of each optimiser step, from a step on; endless. buckets: of each group.

    An endless stream of epochs, each a permutation of the groups, is dealt out to their buckets; a bucket that has
    `size` groups makes the next step. With one bucket these are consecutive slices, which may straddle epochs.
    """
    order = lru_cache(maxsize=2)(lambda epoch: permutation(len(numbers), seed, "order", epoch).numpy())

    def at(position: int) -> tuple[tuple[int, int], int]:
        epoch, place = divmod(position, len(numbers))
        index = order(epoch)[place]
        return (epoch, int(numbers[index])), 0 if buckets is None else int(buckets[index])

    if buckets is None or (buckets == buckets[0]).all():
        for step in count(start):
            yield [at(position)[0] for position in range(step * size, (step + 1) * size)]
    waiting: dict[int, list[tuple[int, int]]] = {}
    for position in count():
        group, bucket = at(position)
        waiting.setdefault(bucket, []).append(group)
        if len(waiting[bucket]) == size:
            ready = waiting.pop(bucket)
            if start == 0:
                yield ready
            start = max(0, start - 1)


def micro_batches(
    ordered: Iterator[list[Any]], batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1
) -> Iterator[list[Any]]:
    """Each step's positions, cut for a process; see `PreferenceDataset.loader`."""
    for step in ordered:
        for micro in range(accumulate):
            yield step[(micro * world + rank) * batch_size :][:batch_size]
