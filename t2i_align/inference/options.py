"""Checks of options that commands share: device, precision, counts, and memory for a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from t2i_align.errors import UserError, unknown

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str) -> None:
    """Raise UserError for a name that is no precision."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)


def check_counts(**counts: int | None) -> None:
    """Raise UserError for a number of steps, images or a batch below 1; None is a default."""
    for key, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{key} must be a whole number of at least 1, found {value!r}")


def pick_device(name: str | None) -> str:
    """The device of this name, or for None the GPU if there is one.

    Raises:
        UserError: no such device in this machine.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no device name; torch built without it; no such number
        raise UserError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return name


@contextmanager
def memory_for(batch_size: int) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one that names the option to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"CUDA out of memory at batch size {batch_size}; lower batch_size (--batch-size)") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return str(error).strip().partition("\n")[0]
