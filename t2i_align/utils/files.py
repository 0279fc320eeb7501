"""Crash-safe output: atomic files and folders, JSON lines, settings of a resumable output, and its lock.

Temporary names are fixed (`.writing_NAME` beside NAME), so that the next attempt overwrites what a killed one left. A
path that is a link stays one: what it leads to is written.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from t2i_align.errors import UserError

WRITING = ".writing_"
LOCK = f"{WRITING}lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems
logger = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path`, renamed to it on success and removed on failure.

    Missing parent folders are created.

    Args:
        path: file to write or replace.
        sync: flush to disk before renaming, so that the content survives a power loss; False for files that are many
            and cheap to make again.
    """
    final, temporary = _names(path)
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder, renamed to `path` on success and removed on failure; replaces what is there.

    Its files are flushed to disk before the renaming. Missing parent folders are created. Where a kill fell between the
    two renames of a replacement, the next use brings the folder back first.
    """
    final, temporary = _names(path)
    old = temporary.with_name(f"{temporary.name}.old")

    def clear() -> None:
        if old.exists() and not final.exists():  # stopped between the two renames
            old.rename(final)
        for left_over in (temporary, old):
            shutil.rmtree(left_over, ignore_errors=True)

    clear()
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if final.exists():  # only an empty folder can be renamed over
            final.rename(old)
        temporary.rename(final)
    finally:
        clear()


def write_text(path: str | Path, text: str) -> None:
    """Write or replace a UTF-8 file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(_encode(text))


def write_json(path: str | Path, value: Any) -> None:
    """Write or replace an indented JSON file atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def append_line(path: str | Path, *records: Mapping[str, Any]) -> None:
    """Append each record as a line of JSON, all in one write."""
    if records:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with open(path, "ab") as stream:
            stream.write(_encode(lines))


def whole_lines(path: str | Path, *, repair: bool = True) -> list[dict[str, Any]]:
    """The objects of a JSONL file (none if it is missing) without a half-written last line.

    Args:
        path: JSONL file.
        repair: cut that line off in the file as well; False where another process may be writing it.

    Raises:
        UserError: a line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_bytes()
    end = text.rfind(b"\n") + 1
    if repair and end < len(text):
        os.truncate(path, end)
    lines = enumerate(text[:end].split(b"\n"), 1)
    return [_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def claim(file: str | Path, settings: Mapping[str, Any], *, advice: str = "choose another output") -> None:
    """Write the settings that an output is made with, or compare them with those it was begun with.

    Args:
        file: JSON file of settings.
        settings: values that JSON can hold.
        advice: how to go on, the end of the message.

    Raises:
        UserError: settings differ, names each key; or the file is not a JSON object.
    """
    file = Path(file)
    if not file.exists():
        write_json(file, settings)
    elif keys := differences(read_json(file), json.loads(json.dumps(settings))):
        raise UserError(f"{file}: was begun with other settings: {'; '.join(keys)}; {advice}")


def differences(
    stored: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = (), prefix: str = ""
) -> list[str]:
    """The keys, dotted where mappings are nested, whose values differ, with both values; without those to ignore."""
    differing = []
    for key in sorted({*stored, *now}):
        before, after = stored.get(key), now.get(key)
        if (name := f"{prefix}{key}") in ignore or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differing += differences(before, after, ignore, f"{name}.")
        else:
            differing.append(f"{name} is {before!r} there, {after!r} here")
    return differing


def read_json(file: str | Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError for anything else."""
    return _object(Path(file).read_bytes(), str(file))


def parse_json(text: bytes, origin: str) -> Any:
    """A JSON value in UTF-8; raises UserError, which names `origin`, for anything else."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not valid JSON: {error}") from error


def as_object(value: Any, origin: str, expected: str = "an object") -> dict[str, Any]:
    """The value if it is a JSON object; raises UserError, which names `origin`, for anything else."""
    if not isinstance(value, dict):
        raise UserError(f"{origin}: expected {expected}, found {type(value).__name__}")
    return value


@contextmanager
def output_lock(output: Path, *, file: bool = False, first: bool = True) -> Iterator[None]:
    """Lock `output` (created if it is a missing folder); the OS releases the lock however this process ends.

    Args:
        output: folder or file to write.
        file: `output` is a file; the lock lies beside it, or beside what it is a link to.
        first: of several processes that write together, this one holds the lock for all.

    Raises:
        UserError: another run holds it, or there is a file where a folder is needed.
    """
    if not first:
        yield
        return
    real = output.resolve()
    lock = real.with_name(f".{real.name}.lock") if file else real / LOCK
    new = not file and not real.exists()
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        acquired = FileLock(lock).acquire(timeout=0)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{output}: {error.filename} is a file; a folder is needed there") from error
    except Timeout:
        raise UserError(f"{output}: another run is writing there; wait for it, or choose another output") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{output}: cannot be written: {error.strerror}") from error
        logger.warning("%s: this file system has no locks, so that nothing keeps a second run from it", output)
        yield
        return
    with acquired:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while locked: a process that has opened it meanwhile is refused
            if new:
                with suppress(OSError):  # a folder in which nothing was written is not left behind
                    real.rmdir()


def _names(path: str | Path) -> tuple[Path, Path]:
    final = Path(path).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    return final, final.with_name(f"{WRITING}{final.name}")


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def _encode(text: str) -> bytes:
    # Names of files can hold lone surrogates; as backslash escapes they are valid JSON.
    return text.encode(errors="backslashreplace")


def _object(text: bytes, origin: str) -> dict[str, Any]:
    return as_object(parse_json(text, origin), origin)
