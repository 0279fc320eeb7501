"""The files of prepared data: their names, and how they are written and read whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

LAYOUT = 3  # raise when a folder written before can no longer be read
MANIFEST, FINGERPRINT, INDEX = "manifest.json", "fingerprint.json", "index.arrow"
GROUPS, PROMPTS, SKIPPED, STATE = "groups.arrow", "prompts.arrow", "skipped.jsonl", "state.json"

Parts = Mapping[str, Any]  # a fingerprint: named JSON values


def differences(found: Parts, wanted: Parts, found_name: str = "found", wanted_name: str = "wanted") -> str:
    """The parts in which two fingerprints differ, as text; empty when they agree."""
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: {found_name} {found.get(name)!r}, {wanted_name} {wanted.get(name)!r}" for name in names)


def write_json(file: Path, values: Any) -> None:
    """Replace a small file in one move."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w") as stream:
        json.dump(values, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_table(file: Path, table: pa.Table) -> None:
    """An Arrow file with one record batch, so that memory-mapped columns are contiguous."""
    batches = table.combine_chunks().to_batches()
    empty = pa.RecordBatch.from_pylist([], table.schema)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(batches[0] if batches else empty)


def read_table(file: Path) -> pa.RecordBatch:
    """The record batch of an Arrow file, memory-mapped; the file descriptor is closed, the mapping stays.

    Such a file is a stream behind 8 bytes. Read as one it opens in a fraction of the time, as no other thread is asked
    for the index at its end.
    """
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source.read_buffer().slice(8)) as stream:
        return stream.read_next_batch()


def readable(size: float) -> str:
    """A number of bytes as people read it."""
    units = ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"
