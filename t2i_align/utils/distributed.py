"""The processes that torchrun or accelerate launch started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import Any, ClassVar, TypeVar

import torch

T = TypeVar("T")


class Distributed:
    """Rank and world size of this process: 0 and 1 for a single one.

    device: this process's GPU on its machine; None leaves the choice open. engine: gathers, where that is not torch:
    the number of the call and this process's value to the values of all.
    """

    engine: ClassVar[Callable[[int, Any], list[Any]] | None] = None

    def __init__(self) -> None:
        self.calls = 0
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local = os.environ.get("LOCAL_RANK")
        self.device = f"cuda:{local}" if local is not None and torch.cuda.is_available() else None

    def share(self, items: Iterable[T], batch: int) -> Iterator[list[T]]:
        """This process's batches, every `world`-th."""
        items = iter(items)
        batches = iter(lambda: list(islice(items, batch)), [])
        return (own for index, own in enumerate(batches) if index % self.world == self.rank)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in every process; returns when all have called this."""
        if self.world == 1:
            return [value]
        if Distributed.engine:
            self.calls += 1
            return Distributed.engine(self.calls, value)
        from accelerate import PartialState
        from accelerate.utils import gather_object

        # Starts the process group. A process may have hours of work left when another one has done its share.
        PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
        values: list[Any] = gather_object([value])
        return values
