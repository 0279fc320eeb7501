"""Crash-safe output: atomic files and folders, JSON lines, settings of a resumable output, and its lock.

Temporary names are fixed (`.writing_NAME` beside NAME), so that the next attempt overwrites what a killed one left.
Links stay links. A command replaces only what it wrote: folders that hold its file (`holds`), files with its mark.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from t2i_align.errors import UserError
from t2i_align.utils.parsing import as_object, parse_json

WRITING = ".writing_"
LOCK = f"{WRITING}lock"
MARKED = 4096  # bytes at the beginning of a file, in which its mark is
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems
logger = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path`, renamed to it on success and removed on failure.

    Missing parent folders are created. Without `sync`, for files that are cheap to make again, power loss may undo it.
    """
    final, temporary = _names(path)
    temporary.unlink(missing_ok=True)  # what a kill left, which some would append to
    try:
        with _named_in_errors(path):
            yield temporary
            if sync:
                sync_file(temporary)
            os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder, renamed to `path` on success and removed on failure; replaces what is there."""
    final, temporary = _names(path)
    old = temporary.with_name(f"{temporary.name}.old")

    def clear() -> None:
        if old.exists() and not final.exists():  # an earlier use was killed between its two renames
            old.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    clear()
    temporary.mkdir()
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors writes for its owner alone
            sync_file(file)  # before the renaming
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
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A value as indented JSON."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """A line of JSON for each record."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write or replace files that belong together: a kill leaves no old one beside a new one.

    All are complete under temporary names first. The first gets its name before the others, so that its mark (see
    `check_own`) tells whose they are; the last one's says that all are there.
    """
    with ExitStack() as stack:
        for name, text in [*texts.items()][::-1]:
            stack.enter_context(atomic_file(folder / name)).write_bytes(_encode(text))
        for name in [*texts][:0:-1]:
            (folder / name).resolve().unlink(missing_ok=True)


def append_line(path: str | Path, *records: Mapping[str, Any]) -> None:
    """Append each record as a line of JSON, all in one write."""
    if records:
        with _named_in_errors(path), open(path, "ab") as stream:
            stream.write(_encode(json_lines(records)))


def whole_lines(path: str | Path, *, repair: bool = True) -> list[dict[str, Any]]:
    """The objects of a JSONL file (none if it is missing) without a half-written last line.

    Args:
        repair: cut that line off in the file as well, or end it where only its end is missing; False where another
            process may be writing it, or it may be of something else.

    Raises:
        UserError: a line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = read_bytes(path)
    end = text.rfind(b"\n") + 1
    try:
        parse_json(text[end:], "")  # all of a line but its end
    except UserError:
        if repair and end < len(text):
            os.truncate(path, end)
    else:
        end = len(text)
        if repair:
            with open(path, "ab") as stream:
                stream.write(b"\n")
    lines = enumerate(text[:end].split(b"\n"), 1)
    return [_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def holds(folder: Path, content: str, marker: str, *, ignored: tuple[str, ...] = (".",)) -> bool:
    """Whether the folder to write holds this content already; False for one that is missing or empty.

    Args:
        content: what a command leaves there, a noun for the message.
        marker: the file in it by which that is known.
        ignored: beginnings of the names that do not count.

    Raises:
        UserError: a file, or a folder that holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder")
    if not folder.is_dir() or all(entry.name.startswith(ignored) for entry in folder.iterdir()):
        return False
    if not (folder / marker).is_file():
        raise UserError(f"{folder}: the folder is not empty and holds no {content}; choose another")
    return True


def check_own(command: str, *files: Path) -> None:
    """Raise UserError where one of the files is there and `command` did not write it.

    The first of them tells for all: it is written first (`write_files`) and has `mark(command)` in its first lines.
    """
    if files[0].is_file():
        with open(files[0], "rb") as stream:
            if mark(command).encode() in stream.read(MARKED):
                return
    for file in files:
        if file.exists():
            raise UserError(f"{file}: exists, and was not written by t2i-align {command}; choose another place")


def mark(command: str) -> str:
    """What the first lines of a file say of the command that wrote it."""
    return f"generated by t2i-align {command}"


def claim(file: str | Path, settings: Mapping[str, Any], *, content: str = "", advice: str = "choose another") -> None:
    """Write the settings that an output is made with, or compare them with those it was begun with.

    Args:
        file: JSON file of settings.
        settings: values that JSON can hold.
        content: what the file's folder is to hold, and nothing else (see `holds`).
        advice: how to go on, the end of the message.

    Raises:
        UserError: settings differ, names each key; or the file is not a JSON object.
    """
    file = Path(file)
    if content:
        holds(file.parent, content, file.name)
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
    return _object(read_bytes(file), str(file))


def read_bytes(file: str | Path) -> bytes:
    """The content of a file; raises UserError where the system refuses it, as for a folder."""
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


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
    real = Path(os.path.realpath(output))
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
        _warn_without_locks(output)
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


@contextmanager
def locked(lock: FileLock) -> Iterator[None]:
    """Hold a lock; on a file system that has none, a single process goes on without.

    Raises:
        filelock.Timeout: another process holds it, and `lock` does not wait.
        UserError: several processes need it, and the file system has none.
    """
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        folder = Path(lock.lock_file).parent
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"{folder}: this file system has no locks; write there with a single process") from error
        _warn_without_locks(folder)
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _named_in_errors(path: str | Path) -> Iterator[None]:
    """Have the system's errors of writing (a full disk) name the file, as those of opening one do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@lru_cache  # once a folder
def _warn_without_locks(folder: Path) -> None:
    logger.warning("%s: this file system has no locks, so that nothing keeps a second run from it", folder)


def _names(path: str | Path) -> tuple[Path, Path]:
    final = Path(os.path.realpath(path))  # a loop of links is the system's error when it is opened
    if final.exists() and not (final.is_file() or final.is_dir()):  # a device or pipe would be replaced by a file
        raise UserError(f"{path}: is no regular file; choose another place to write")
    final.parent.mkdir(parents=True, exist_ok=True)
    return final, final.with_name(f"{WRITING}{final.name}")


def sync_file(file: Path) -> None:
    """Have the system write a file to the disk now."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def _encode(text: str) -> bytes:
    # Names of files can hold lone surrogates; as backslash escapes they are valid JSON.
    return text.encode(errors="backslashreplace")


def _object(text: bytes, origin: str) -> dict[str, Any]:
    return as_object(parse_json(text, origin), origin)
