"""Webdataset shards: tar files in which members of one key, the name up to its first dot, are one sample.

    000017.json            {"prompt": "a red fox", "scores": [3, 1]}
    000017.0.jpg  000017.1.jpg

A sample becomes a row: each member is a column named by the rest of its name (`0.jpg`), the keys of `json` are columns
themselves, `txt` is text, and so is `label_0.txt`, as the column `label_0`. Nothing is unpacked to disk, so names that
lead elsewhere lead nowhere.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_align.data.schema import Skipped
from t2i_align.errors import UserError

TEXTS = ("txt", "caption", "prompt")
MAX_MEMBER = 256 << 20  # bytes; what a header claims is not read into memory unseen

Sample = tuple[str, dict[str, Any]]


def samples(file: Path, *, images: bool = True) -> Iterator[Sample | Skipped]:
    """Key and row of each sample of a shard, in its order. Without `images`, other members than text are left out.

    Raises:
        UserError: not a tar file, or one that is cut short, with the sample before that.
    """
    values: dict[str, Any] = {}
    key, bad = "", ""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                folder, _, base = name.rpartition("/")
                stem, _, column = base.partition(".")
                if member.isdir() or not column or base.startswith("."):
                    continue
                found = f"{folder}/{stem}" if folder else stem
                if found != key:
                    yield from _finished(file, key, values, bad)
                    key, values, bad = found, {}, ""
                bad = bad or _take(archive, member, column, values, images)
            yield from _finished(file, key, values, bad)
            if file.stat().st_size < archive.offset + tarfile.BLOCKSIZE:  # cut between two members
                raise EOFError("it has no end mark")
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        after = f" after sample {key!r}" if key else ""
        raise UserError(f"{file}: cannot be read as a tar file{after} (damaged or cut short?): {error}") from error


def _finished(file: Path, key: str, values: dict[str, Any], bad: str) -> Iterator[Sample | Skipped]:
    if bad:
        yield Skipped(id=f"{file.name}:{key}", origin=f"{file}, sample {key!r}", reason=bad)
    elif key:
        yield key, values


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, column: str, values: dict[str, Any], wanted: bool) -> str:
    """Add a member to its sample's row; why that cannot be, or nothing."""
    kind = column.rpartition(".")[2]
    if kind in TEXTS:
        column = column.removesuffix(f".{kind}")
    if column in values:
        return f"two members named {column!r}: samples of the same key must not follow each other"
    if not member.isfile():
        return f"{column!r} is a link, not a file"
    if member.size > MAX_MEMBER:
        return f"{column!r} has {member.size} bytes, more than {MAX_MEMBER}"
    if not wanted and kind not in (*TEXTS, "json"):
        values[column] = b"left out"
        return ""
    stream = archive.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name}: {member.size} bytes expected, {len(content)} found")
    if kind == "json":
        return _take_json(content, column, values)
    if kind in TEXTS:
        try:
            values[column] = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            return f"{column!r} is not UTF-8 text: {error}"
    else:
        values[column] = content
    return ""


def _take_json(content: bytes, column: str, values: dict[str, Any]) -> str:
    try:
        entry = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return f"{column!r} is not valid JSON: {error}"
    if not isinstance(entry, dict):
        return f"{column!r} must hold an object, found {type(entry).__name__}"
    values.update(entry)
    return ""
