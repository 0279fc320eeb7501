"""Random numbers as a function of (seed, epoch, sample id, name) alone.

Not of the batch size, the number of processes, the device, or what ran before. So a resumed run equals an
uninterrupted one bit for bit, and 2 x 4 accumulated equals 8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import ForwardProcess


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, equal on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def permutation(n: int, *key: object) -> Tensor:
    """A random order of n things that depends on the key alone, [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(stable_seed(*key)))


class SampleRNG:
    """Random numbers for one batch; each row is keyed by its own sample.

    Args:
        seed: the run's seed.
        keys: one string per sample, "epoch/group id".
        process: the model's forward process, which turns the numbers into noisy latents and targets.
        timestep_sampling: the named distribution of training times (see `ForwardProcess.timesteps`).
        device: where the numbers are wanted; they are drawn on the CPU so that they agree everywhere.

    deciding: entered around what decides the course of a step, whose values have to be there also where tensors have
    none (see `planning.trace`).
    """

    deciding: Callable[[], AbstractContextManager[object]] = staticmethod(nullcontext)

    def __init__(
        self,
        seed: int,
        keys: Sequence[str],
        process: ForwardProcess,
        timestep_sampling: str = "uniform",
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = seed
        self.keys = tuple(keys)
        self.process = process
        self.timestep_sampling = timestep_sampling
        self.device = torch.device(device)

    @property
    def on_cpu(self) -> SampleRNG:
        """The same numbers on the CPU, for what decides the course of a step: reading them waits for no device."""
        return SampleRNG(self.seed, self.keys, self.process, self.timestep_sampling)

    def moved(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device, which the host does not wait for."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers [B, *shape], float32."""
        return self._rows(torch.randn, name, shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), [B, *shape], float32."""
        return self._rows(torch.rand, name, shape)

    def choice(self, name: str, count: int) -> list[int]:
        """For each row one of `count` numbers from 0, for what decides the course of a step."""
        with self.deciding():
            numbers: list[int] = (self.on_cpu.uniform(name) * count).long().tolist()
        return numbers

    def timesteps(self) -> Tensor:
        """One training time per group, [B]: its candidates share it."""
        return self.process.timesteps(self.uniform("timestep"), self.timestep_sampling)

    def _rows(self, sample: object, name: str, shape: Sequence[int]) -> Tensor:
        out = torch.empty((len(self.keys), *shape))
        generator = torch.Generator()
        for row, key in zip(out, self.keys, strict=True):
            generator.manual_seed(stable_seed(self.seed, key, name))
            sample(tuple(shape), generator=generator, out=row)  # type: ignore[operator]
        return self.moved(out)
