"""The reference's errors, stored by one run and reused by others that differ only in their loss.

Noise and times depend on (seed, epoch, sample) alone, so that a sweep over beta, learning rate, link or objective meets
the same noisy latents again, and of the frozen reference an objective needs two numbers a pair and epoch. They are kept
in the cache's folder, under everything on which they depend to the last bit, the size of a micro-batch included: a run
with stored errors equals one that computes them. Where anything differs, they are computed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import t2i_align
from t2i_align.config import RunConfig
from t2i_align.data.batch import Conditioning
from t2i_align.data.loader import digest
from t2i_align.errors import UserError
from t2i_align.utils.arrow import intact, read_table, write_table
from t2i_align.utils.files import atomic_file, differences, read_json, write_json

if TYPE_CHECKING:
    from pipelines import ForwardProcess
    from t2i_align.training.reference import Reference

FINGERPRINT, ENDING = "fingerprint.json", ".arrow"
SAME = (
    "seed", "batch_size", "timestep_sampling", "caption_dropout", "precision", "reference", "attention", "compile",
)  # fmt: skip
KEPT = 4096  # rows in memory before they are written


class StoredErrors:
    """Errors [k] of the reference by sample, "epoch/group id". Used as a context, it writes what is left at the end.

    folder: where they are, named by their fingerprint. reused: number of micro-batches that needed no reference.
    """

    def __init__(self, root: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.fingerprint = root / digest(fingerprint), fingerprint
        self.rows: dict[str, np.ndarray] = {}
        self.new: list[tuple[Sequence[str], Tensor]] = []
        self.reused = 0
        self.load()

    def load(self) -> None:
        """Read what is in the folder. Raises UserError where a file of it is damaged."""
        for file in sorted(self.folder.glob(f"*{ENDING}")):
            with intact(file):
                table = read_table(file)
                values = np.frombuffer(table["errors"].values.buffers()[1], np.float32).reshape(len(table), -1)
                self.rows.update(zip(table["key"].to_pylist(), values, strict=True))

    def found(self, keys: Sequence[str]) -> Tensor | None:
        """The errors of these samples, [B, k]; None unless all of them are stored."""
        if not all(key in self.rows for key in keys):
            return None
        self.reused += 1
        return torch.from_numpy(np.stack([self.rows[key] for key in keys]))

    def keep(self, keys: Sequence[str], errors: Tensor) -> None:
        """Store the errors [B, k] of these samples; they are fetched from the device when they are written."""
        self.new.append((keys, errors.detach()))
        if sum(len(keys) for keys, _ in self.new) >= KEPT:
            self.write()

    def write(self) -> None:
        """Write what was computed since the last time, as a file named by its content."""
        if not self.new:
            return
        keys = [key for keys, _ in self.new for key in keys]
        values = torch.cat([errors for _, errors in self.new]).float().cpu().numpy()
        self.new.clear()
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        if not (file := self.folder / FINGERPRINT).exists():
            write_json(file, dict(self.fingerprint))
        name = hashlib.sha256("\n".join(keys).encode() + values.tobytes()).hexdigest()[:16]
        with atomic_file(self.folder / f"{name}{ENDING}") as temporary:
            write_table(temporary, pa.table({"key": pa.array(keys), "errors": column}))

    def __enter__(self) -> StoredErrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write()

    def describe(self) -> str:
        """What there is, or what keeps a run from using the errors of the run most like it."""
        if self.rows:
            return f"{len(self.rows)} errors of the reference are stored in {self.folder}"
        stored = [read_json(file) for file in sorted(self.folder.parent.glob(f"*/{FINGERPRINT}"))]
        changed = min((differences(one, self.fingerprint) for one in stored), key=len, default=[])
        why = f"; other runs' were computed with {'; '.join(changed)}" if changed else ""
        return f"the reference's errors are computed and stored in {self.folder}{why}"


class RecallingReference:
    """The reference for one micro-batch, with its errors where they are stored.

    stored: [B, k] on the device, or None; `keep` is then called with what was computed.
    """

    def __init__(
        self, reference: Reference, errors: StoredErrors, keys: Sequence[str], moved: Callable[[Tensor], Tensor]
    ) -> None:
        self._reference, self._errors, self._keys = reference, errors, keys
        found = errors.found(keys)
        self.stored = None if found is None else moved(found)

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self._reference(noisy_latents, timesteps, conditioning)

    def keep(self, errors: Tensor) -> None:
        """Store the errors of the micro-batch's samples, [B, k]."""
        self._errors.keep(self._keys, errors)


def check_stored(config: RunConfig) -> None:
    """Raise UserError where `train.store_reference` is set and the run needs more than the reference's errors."""
    if not config.train.store_reference:
        return
    name, needs = config.objective.name, config.objective.needs
    if not needs.reference:
        raise UserError(f"train.store_reference: {name} asks no reference whose errors could be stored")
    if config.objective.errors_key() is None:
        raise UserError(f"train.store_reference: {name} needs the reference's prediction itself, not only its errors")
    if config.train.reference_update or config.health.max_drift is not None:
        key = "train.reference_update" if config.train.reference_update else "health.max_drift"
        raise UserError(f"train.store_reference and {key} exclude each other: that one needs the reference itself")


def open_errors(config: RunConfig, root: Path, reference: Reference, data: str) -> StoredErrors:
    """The stored errors that serve a run. root: the cache's folder. data: the data's fingerprint."""
    train, pipeline = config.train, reference.pipeline
    return StoredErrors(
        root / "reference",
        {
            "errors": config.objective.errors_key(),
            "data": data,
            "reference": reference.fingerprint(),
            "process": _process_hash(pipeline.process),
            **{f"train.{name}": getattr(train, name) for name in SAME},
            "trains": config.trains,
            "device": pipeline.device.type,
            "versions": f"t2i-align {t2i_align.__version__}, torch {torch.__version__}",
        },
    )


def _process_hash(process: ForwardProcess) -> str:
    """Of the noise at 64 times, by which two schedules or shifts differ."""
    times = process.timesteps((torch.arange(64) + 0.5) / 64)
    coefficients = torch.stack([times.double(), *(value.double() for value in process.alpha_sigma(times))])
    return hashlib.sha256(f"{process.prediction_type}".encode() + coefficients.numpy().tobytes()).hexdigest()[:16]
