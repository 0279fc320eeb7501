"""Parquet files, row by row: readable or a clear error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t2i_align.errors import UserError

ROWS_AT_ONCE = 32  # images of so many rows are held in memory


def open_parquet(file: Path) -> pq.ParquetFile:
    """The file, memory-mapped. Raises UserError where it is empty or no parquet."""
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file (damaged or cut short?): {error}") from error
    names = parquet.schema_arrow.names
    if len(set(names)) < len(names):
        raise UserError(f"{file}: two columns of the same name among {', '.join(names)}")
    return parquet


def rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows with those of the columns that there are, streamed. Raises UserError at a damaged page."""
    parquet = open_parquet(file)
    wanted = [name for name in columns if name in parquet.schema_arrow.names]
    done = 0
    batches = parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted)
    while True:
        try:
            batch = next(batches, None)
            found = None if batch is None else batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:  # or what Python has no value for
            raise UserError(f"{file}: cannot be read after row {done} (damaged?): {error}") from error
        if found is None:
            return
        yield from found
        done += len(found)
