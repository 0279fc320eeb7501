"""Prepared data survive: kills, full disks, damaged files and several writers at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from t2i_align.data import encode
from t2i_align.data import store as store_module
from t2i_align.data.store import Store
from t2i_align.errors import UserError
from tests.data.test_examples import StandIn, contents, pick_rows, write_parquet
from tests.data.test_store import assert_paired, fetched, make


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_ROWS_PER_SHARD", 4)


@pytest.mark.parametrize("after", [1, 5, 8, 9, 14, 23, 24])
def test_an_interrupted_prepare_continues_to_the_same_cache(tmp_path: Path, after: int) -> None:
    rows = pick_rows(12)
    rows["jpg_0"][5] = b"damaged"
    source = write_parquet(tmp_path / "a.parquet", rows)
    make(source, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped in the middle"):
        make(source, tmp_path / "out", StandIn(fail_after=after - 1))
    assert not (tmp_path / "out" / "manifest.json").exists()
    if (tmp_path / "out").exists():
        with pytest.raises(UserError, match="unfinished"):
            Store(tmp_path / "out")
    complete = len(list((tmp_path / "out").glob("shard-?????")))
    pipeline = StandIn()
    make(source, tmp_path / "out", pipeline)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert pipeline.images <= 1 + 2 * (12 - 4 * complete)  # complete shards are not encoded again


def test_kill_nine_continues_to_the_same_cache(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", pick_rows(40))
    make(source, tmp_path / "whole")
    script = (
        "import sys; from pathlib import Path; from tests.data.test_examples import StandIn\n"
        "from t2i_align.data import encode, readers, store\n"
        "encode.MAX_ROWS_PER_SHARD = 4; source, out = map(Path, sys.argv[1:])\n"
        "encoder = encode.Latents(StandIn(delay=0.03), [(8, 8)], batch_size=3)\n"
        "parts = {'source': 'abc', 'height': 8}\n"
        "store.write(readers.read(source), encoder, out, fingerprint=parts, progress=False)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(out)], cwd=Path(__file__).parents[2])
    try:
        while not (out / "shard-00003").exists():
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()
    make(source, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_left_overs_are_not_taken_for_shards(tmp_path: Path) -> None:
    """A half-written shard, and shards after one that is gone, are written again."""
    source = write_parquet(tmp_path / "a.parquet", pick_rows(12))
    make(source, tmp_path / "whole")
    out = tmp_path / "out"
    make(source, out)
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "shard-00001")
    (out / ".writing_shard-00001").mkdir()
    (out / ".writing_shard-00001" / "groups.arrow").write_bytes(b"half")
    make(source, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_kill_inside_the_first_write_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", pick_rows(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".writing_fingerprint.json").write_text('{"sour')
    assert_paired(make(source, tmp_path / "out"), [0, 1, 2])


def test_a_full_disk_is_an_error_that_one_continues_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "a.parquet", pick_rows(12))
    make(source, tmp_path / "whole")
    written = []

    def full(file: Path, *rest: Any) -> None:
        written.append(file)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(file, *rest)

    genuine = store_module.write_table
    monkeypatch.setattr(store_module, "write_table", full)
    with pytest.raises(UserError, match="the disk is full"):
        make(source, tmp_path / "out")
    monkeypatch.setattr(store_module, "write_table", genuine)
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def zeroed(content: bytes) -> bytes:
    """A quarter is zero, as after a power cut."""
    return content[: len(content) * 3 // 4].ljust(len(content), b"\0")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("shard-00001/groups.arrow", lambda content: content[:-1], r"has \d+ bytes instead of \d+"),
        ("shard-00001/groups.arrow", None, "is missing"),
        ("shard-00001/groups.arrow", flipped, "its checksum is another"),
        ("shard-00001/groups.arrow", zeroed, "its checksum is another"),
        ("shard-00000/texts.arrow", flipped, "its checksum is another"),
        ("index.arrow", zeroed, "its checksum is another"),
        ("index.arrow", lambda content: b"", "damaged"),
        ("index.arrow", None, "damaged .*No such file"),
        ("manifest.json", lambda content: b"[]", "damaged"),
        ("manifest.json", lambda content: b"", "damaged"),
        ("manifest.json", lambda content: b'{"layout": 4}', "damaged"),
        ("manifest.json", lambda content: b"\xff", "damaged"),
        ("fingerprint.json", lambda content: b"", "not valid JSON"),
        ("fingerprint.json", lambda content: b"[]", "expected an object"),
        ("shard-00001/state.json", lambda content: content[:9], r"has 9 bytes instead of \d+"),  # it is not read
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, damage: Any, message: str) -> None:
    source, out = write_parquet(tmp_path / "a.parquet", pick_rows(12)), tmp_path / "out"
    store = make(source, out)
    everything = fetched(store, *range(12))
    damaged = out / file
    content = damaged.read_bytes()
    damaged.unlink()
    if damage:
        damaged.write_bytes(damage(content))
    with pytest.raises(UserError, match=rf"{file}: .*{message}"):
        fetched(make(source, out), *range(12))
    damaged.write_bytes(content)
    assert torch.equal(fetched(make(source, out), *range(12)).latents, everything.latents)


def test_a_finished_cache_with_a_cut_fingerprint_is_refused(tmp_path: Path) -> None:
    """Also where it is opened without being made."""
    out = make(write_parquet(tmp_path / "a.parquet", pick_rows(12)), tmp_path / "out").path
    os.truncate(out / "fingerprint.json", 5)
    with pytest.raises(UserError, match=r"fingerprint\.json: this part .* has 5 bytes instead of \d+"):
        Store(out)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_damaged_state_is_named_when_it_continues(tmp_path: Path, content: bytes) -> None:
    source, out = write_parquet(tmp_path / "a.parquet", pick_rows(12)), tmp_path / "out"
    make(source, out)
    (out / "manifest.json").unlink()
    (out / "shard-00001" / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001/state\.json: damaged .*; delete the folder of this cache"):
        make(source, out)


def test_caches_without_checksums_are_read(tmp_path: Path) -> None:
    """Those of earlier versions."""
    out = tmp_path / "out"
    whole = make(write_parquet(tmp_path / "a.parquet", pick_rows(6)), out)
    manifest = json.loads((out / "manifest.json").read_text())
    for part in (manifest, *manifest["shards"]):
        del part["sha256"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(fetched(Store(out), *range(6)).latents, fetched(whole, *range(6)).latents)


def test_several_writers_make_the_same_cache(tmp_path: Path) -> None:
    """Each writes whole shards; a text is encoded by the one whose shard has it first. Locks part threads as well."""
    rows = pick_rows(30)
    rows["jpg_0"][5] = b"damaged"
    source = write_parquet(tmp_path / "a.parquet", rows)
    make(source, tmp_path / "alone")
    pipelines = [StandIn(delay=0.02) for _ in range(3)]
    writers = [threading.Thread(target=make, args=(source, tmp_path / "shared", p)) for p in pipelines]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert sum(pipeline.images > 3 for pipeline in pipelines) > 1  # one image is a trial of the size


def test_a_file_system_without_locks_takes_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    source = write_parquet(tmp_path / "a.parquet", pick_rows(10))
    make(source, tmp_path / "locked")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "locked")
    assert caplog.text.count("this file system has no locks") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no locks; write there with a single process"):
        make(source, tmp_path / "several")


def test_a_shard_whose_writer_was_stopped_is_written_again(tmp_path: Path) -> None:
    source, out = write_parquet(tmp_path / "a.parquet", pick_rows(14)), tmp_path / "out"
    make(source, tmp_path / "alone")
    out.mkdir()
    holds = threading.Event()

    def write_and_stop() -> None:
        with FileLock(out / ".writing_shard-00001.lock"):
            holds.set()
            while not (out / "shard-00003").exists():
                time.sleep(0.01)

    other = threading.Thread(target=write_and_stop)
    other.start()
    holds.wait()
    with pytest.raises(UserError, match="another process was stopped while it wrote shard-00001; run again"):
        make(source, out)
    assert (out / "shard-00002").is_dir() and not (out / "shard-00001").exists()
    make(source, out)
    assert contents(out) == contents(tmp_path / "alone")
