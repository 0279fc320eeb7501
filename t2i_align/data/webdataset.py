"""Samples of webdataset shards as rows.

A sample, that is the members of one key (the name up to its first dot), is a row:

    000017.json            {"prompt": "a red fox", "scores": [3, 1]}
    000017.0.jpg  000017.1.jpg

Each member is a column named by the rest of its name, media without their ending (`0`), text as `label_0` for
`label_0.txt`; the keys of `json` are columns themselves. `images` lists the media in the natural order of their names.
`label_2` and `caption_2` belong to the image whose name ends in 2; where names end in no numbers, they count from 0.
Nothing is unpacked to disk, so names that lead elsewhere lead nowhere.
"""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_align.data.media import MEDIA_SUFFIXES
from t2i_align.data.paths import natural
from t2i_align.data.schema import LEFT_OUT, Row, Skipped, Values, finite
from t2i_align.errors import UserError
from t2i_align.utils.parsing import as_object, parse_json

MAX_MEMBER = 256 << 20  # bytes; what a tar header claims is not read into memory unseen
TEXTS = ("txt", "caption", "prompt")  # endings of text members
PROMPTS = ("prompt", "caption", "txt", "original_prompt")  # columns of a sample that hold its prompt
NAMES = (*PROMPTS, "chosen", "rejected")  # in letters of any case
NUMBERED = (("label", "scores"), ("caption", "captions"))  # `label_0` and so on are the column `scores`
Members = dict[str, list[tuple[str, tarfile.TarInfo]]]  # of each sample, by its key


class _Contradiction(UserError):
    """A value that proves another numbering than ours, by which other samples would be turned round."""


def samples(file: Path, name: str, images: bool) -> Iterator[Row | Skipped]:
    """The samples of a shard, whose members need not follow each other; `name` begins their ids.

    Raises:
        UserError: a file that is damaged or cut short; winners that are numbered otherwise than the images.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            members = _members(archive)
            if file.stat().st_size < archive.offset + tarfile.BLOCKSIZE:  # cut between two members
                raise EOFError("it has no end mark")
            for key, own in members.items():
                row = Row(f"{name}:{key}", f"{file}, sample {key!r}", {})
                try:
                    yield row._replace(values=_sample(archive, own, images))
                except _Contradiction as error:
                    raise UserError(f"{row.origin}: {error}") from error
                except UserError as error:
                    yield row.skipped(str(error))
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: cannot be read as a tar file (damaged, cut short or compressed?): {error}") from error


def _members(archive: tarfile.TarFile) -> Members:
    """The members of each sample and their columns; without what belongs to no sample."""
    members: Members = defaultdict(list)
    for member in archive:
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        stem, _, column = base.partition(".")
        if not member.isdir() and column and not base.startswith("."):
            members[f"{folder}/{stem}" if folder else stem].append((column, member))
    return members


def _sample(archive: tarfile.TarFile, members: list[tuple[str, tarfile.TarInfo]], images: bool) -> Values:
    """The columns of a sample. Raises UserError with the reason where it cannot be used."""
    values: Values = {}
    media: dict[str, Any] = {}
    seen: set[tuple[str, bool]] = set()
    for column, member in members:
        stem, _, ending = column.rpartition(".")
        ending = ending.lower()
        is_media = f".{ending}" in MEDIA_SUFFIXES
        name = stem if is_media or (ending in TEXTS and stem) else column
        name = name.lower() if name.lower() in NAMES else name
        if (name, is_media) in seen:
            raise UserError(f"two members named {name!r}")
        seen.add((name, is_media))
        if not member.isfile():
            raise UserError(f"{column!r} is a link, not a file")
        if member.size > MAX_MEMBER:
            raise UserError(f"{column!r} has {member.size} bytes, more than {MAX_MEMBER}")
        if ending == "json":
            values |= as_object(parse_json(_content(archive, member), repr(column)), repr(column))
        elif ending in TEXTS:
            try:
                values[name] = _content(archive, member).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{column!r} is not UTF-8 text: {error}") from error
        elif is_media:
            media[name] = _content(archive, member) if images else LEFT_OUT
    names = sorted(media, key=natural)
    if not names:
        columns = ", ".join(column for column, _ in members)
        raise UserError(f"no image or clip among {columns} (known endings: {' '.join(MEDIA_SUFFIXES)})")
    values["prompt"] = next((values[column] for column in PROMPTS if values.get(column)), None)
    return {**values, **_by_number(values, names), **media, "images": [media[name] for name in names]}


def _by_number(values: Values, names: list[str]) -> Values:
    """The labels and captions of a sample in the order of its images, and the place of the winner among these."""
    ends = [int(match[0]) for name in names if (match := re.search(r"[0-9]{1,9}$", name))]
    numbers = ends if len({*ends}) == len(names) else [*range(len(names))]
    ordered: Values = {}
    for prefix, column in NUMBERED:
        own = {
            int(m[1]): value for key, value in values.items() if (m := re.fullmatch(rf"{prefix}_([0-9]{{1,9}})", key))
        }
        if own and not values.get(column) and not (column == "scores" and {"chosen", "rejected"} <= {*names}):
            if own.keys() != {*numbers}:
                raise UserError(f"{prefix}_{{{', '.join(map(str, sorted(own)))}}} do not fit images {', '.join(names)}")
            ordered[column] = [own[number] for number in numbers]
    value = values.get("winner")
    number = None if isinstance(value, bool) else finite(value)
    winner = str(value).strip() if number is None or number % 1 else str(int(number))
    places = {name: place for place, name in enumerate(names)}
    if numbers is ends:
        places = {str(number): place for place, number in enumerate(numbers)} | places
        if winner.isdecimal() and winner not in places:
            raise _Contradiction(f"'winner' is {winner}, but images are numbered {', '.join(map(str, numbers))}")
    return ordered | ({"winner": places[winner]} if winner in places else {})


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name}: {member.size} bytes expected, {len(content)} found")
    return content
