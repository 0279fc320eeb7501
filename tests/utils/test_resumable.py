"""Tables of several processes; the commands that write them test continuing after a kill and foreign files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i_align.utils.files import whole_lines
from t2i_align.utils.resumable import ResumableTable

SCHEMA = pa.schema([("id", pa.string()), ("parts", pa.map_(pa.string(), pa.float64()))])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_processes_see_each_others_rows_and_the_first_merges_them(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"t.{ending}"
    first, second = (ResumableTable(out, schema=SCHEMA, rank=rank) for rank in (0, 1))
    with second.begun():
        second.add([{"id": "b", "parts": {"x": 1.0}}], [{"id": "c", "origin": "row 3", "reason": "damaged"}])
        with open(second.file, "a") as stream:
            stream.write('{"id": "hal')  # being written
        with first.begun():
            assert first.keys == {("b",)} and first.skipped == {("c", "row 3")}
            first.add([{"id": "b"}, {"id": "a"}, {"id": "a"}])
            assert second.file.read_text().endswith('{"id": "hal')  # only its own process repairs it
            first.merge()
    rows = whole_lines(out) if ending == "jsonl" else pq.read_table(out).to_pylist(maps_as_pydicts="strict")
    assert {row["id"]: row.get("parts") for row in rows} == {"a": None, "b": {"x": 1.0}} and len(rows) == 2
    assert not second.file.exists()
