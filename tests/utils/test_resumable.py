"""Tables of several processes; the commands that write them test continuing after a kill and foreign files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i_align.errors import UserError
from t2i_align.utils.files import append_line, whole_lines
from t2i_align.utils.resumable import ResumableTable

FOREIGN = [
    "my notes, one line",
    '{"my": "notes"}',
    '{"image": "a.png", "prompt": "x"}',  # a list to score is not a table of scores
    '{"id": 1}\n{"my": ',
    '{"id": 1}\n{"name": 2}\n{"id": 3',
    "[1]\n",
]
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
    assert not second.file.exists() and not second.skipped_file.exists()
    assert [row["id"] for row in whole_lines(Path(f"{out}.skipped.jsonl"))] == ["c"]


def test_the_first_process_drops_what_all_have_written(tmp_path: Path) -> None:
    """Another one that begins after it leaves what is there."""
    first, second = (ResumableTable(tmp_path / "t.jsonl", rank=rank) for rank in (0, 1))
    with first.begun({"a": 1}), second.begun({"a": 1}):
        second.add([{"id": "b"}], [{"id": "c", "origin": "row 3", "reason": "damaged"}])
    with first.begun({"a": 2}, force=True), second.begun({"a": 2}, force=True):
        assert not first.keys and not first.skipped and not second.keys
        first.add([{"id": "d"}])
        second.add([{"id": "e"}])
        first.merge()
    assert [row["id"] for row in whole_lines(first.out)] == ["d", "e"]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("ending", ["", ".skipped.jsonl"])
def test_files_of_something_else_are_left_as_they_are(ending: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / f"mine.jsonl{ending}"
    file.write_text(text)
    with pytest.raises(UserError, match=file.name), ResumableTable(tmp_path / "mine.jsonl").begun():
        pass
    assert file.read_text() == text


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_row_that_lacks_its_end_is_cut_off_or_ended(cut: int, tmp_path: Path) -> None:
    """Nothing but the last row's line feed is missing: that row counts."""
    table = ResumableTable(tmp_path / "t.jsonl")
    rows = b'{"id": 1}\n{"id": 2}\n'
    table.out.write_bytes(rows[:-cut])
    with table.begun():
        assert table.keys == ({(1,), (2,)} if cut == 1 else {(1,)})
        table.add([{"id": 2}])
    assert table.out.read_bytes() == rows


def test_full_disk_is_reported_with_the_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        append_line("/dev/full", {"id": 1})
