"""What the training loop is given: the methods that a `Task` implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from t2i_align.training.sections import HealthConfig
from t2i_align.training.weights import Weights


class Task(ABC):
    """What a loop trains.

    weights: of the network, on the accelerator's device, with gradients switched on for what is to be trained.
    fingerprint: of the data; equal when each step takes the same samples. groups: how many there are, if that is known.
    accumulate: micro-batches of a step. health: how often it is rolled back, and from when. advice: what helps against
    divergence. over: why training ends early, "" while it does not.
    """

    weights: Weights
    fingerprint: str
    groups: int | None = None
    accumulate: int = 1
    health: HealthConfig = HealthConfig(rollbacks=0)
    advice: str = "A smaller optim.lr usually helps."
    over: str = ""

    @abstractmethod
    def batches(self, step: int) -> Iterator[Any]:
        """Endless micro-batches of this process on its device, from an optimiser step on."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [B] with gradient through `network` (which may be wrapped), and metrics [B] each to log.

        A metric `loss` is logged instead of the loss.
        """

    def stepped(self, means: Callable[[], dict[str, Tensor]]) -> None:
        """Called after each optimiser step; `means()` are the step's metrics averaged over all its groups."""
        return

    def due(self, step: int, last: bool) -> Sequence[Callable[[], dict[str, float]]]:
        """What else is done after this step (0: before the first); the results are logged."""
        return ()

    def watched(self) -> dict[str, float]:
        """More metrics of a step that is logged or saved; costly ones that are not measured at each step."""
        return {}

    def export(self, folder: Path, whole: bool = False) -> Path | None:
        """Write what is trained, for use, into a checkpoint's or the run's folder; returns what loads it.

        whole: also what takes long to write.
        """
        return None

    def exporting(self, whole: bool = False) -> AbstractContextManager[None]:
        """Entered by all processes where the main one calls `export`, so that they can gather what is sharded."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights and optimiser: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's `state`."""
        return
