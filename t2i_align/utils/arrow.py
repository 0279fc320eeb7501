"""Arrow files of one record batch, memory-mapped and checked against their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from t2i_align.errors import UserError


def write_table(file: Path, table: pa.Table) -> None:
    """Write an Arrow file of one record batch, so that mapped columns are contiguous."""
    batches = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(batches[0])


def read_table(file: Path, expected: str | None = None) -> pa.RecordBatch:
    """The record batch of an Arrow file, memory-mapped; the file descriptor is closed, the mapping stays.

    Such a file is a stream behind 8 bytes. Read as one it opens in a fraction of the time, as no other thread is asked
    for the index at its end.

    Raises:
        UserError: its checksum is not the expected one (None: not compared), or it cannot be read.
    """
    with intact(file), pa.memory_map(str(file)) as source:
        content = source.read_buffer()
        if expected not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError("its checksum is another than when it was written")
        with pa.ipc.open_stream(content.slice(8)) as stream:
            return stream.read_next_batch()


def sha256(file: Path) -> str:
    """The checksum of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def intact(file: Path) -> Iterator[None]:
    """Whatever reading a damaged file of a cache raises becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: damaged ({reason}); delete the folder of this cache and prepare it again") from error
