"""Images with prompts, from whatever lists them: what `generate` wrote, one's own lists, or preference data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from t2i_align.data import parquet, readers
from t2i_align.data.media import frame_files
from t2i_align.data.readers import has_lone_surrogate
from t2i_align.data.schema import Group, Media
from t2i_align.data.store import Store, is_store
from t2i_align.errors import UserError
from t2i_align.inference.generate import LIST

IMAGE_KEYS = ("image", "file")  # a list of one's own, and what `generate` writes
PROMPT_KEYS = ("prompt", "caption")
GROUP_KEYS = ("images", "chosen")  # a JSONL with one of these is preference data


@dataclass(frozen=True)
class Entry:
    """An image to score.

    image: as the list names it. media: where that is, or its encoded bytes. error: why there is none.
    """

    image: str
    media: Media
    prompt: str
    error: str | None = None

    @cached_property
    def sha256(self) -> str | None:
        """Of the file, or of a clip's folder of frames: every `generate` gives its images the same names.

        None if it cannot be read.
        """
        if self.error:
            return None
        if isinstance(self.media, bytes):
            return hashlib.sha256(self.media).hexdigest()
        try:
            if not self.media.is_dir():
                return hashlib.sha256(self.media.read_bytes()).hexdigest()
            names = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in frame_files(self.media)]
            return hashlib.sha256(json.dumps(names).encode()).hexdigest()
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return None


def images_of(source: str | Path) -> tuple[Iterator[Entry], int | None]:
    """The images of a source, none of them opened, and how many there are where that is known.

    Raises:
        UserError: nothing there or nothing listed; a line without an image or a prompt, of a parquet as it is met.
    """
    path = Path(source).expanduser()
    if path.is_dir() and is_store(path):
        store = Store(path)
        if "conditioning" in store.manifest:
            raise UserError(f"{source}: holds encoded latents, not images; score the source that it was made of")
        return _stored(store), int(store.k.sum())
    listed = path / LIST if path.is_dir() else path
    if listed.is_file() and listed.suffix == ".parquet":
        names = set(parquet.open_parquet(listed).schema_arrow.names)
        if names & set(IMAGE_KEYS):
            return _rows(listed, names), parquet.open_parquet(listed).metadata.num_rows
    elif listed.is_file() and not _is_preferences(listed):
        entries = _lines(listed)
        return iter(entries), len(entries)
    elif not _known(source, path):
        expected = f"a folder with {LIST}" if path.is_dir() else f"a JSONL file or a folder with {LIST}"
        raise UserError(f"{listed}: no such file; expected {expected}, or preference data")
    survey = readers.survey(source)
    if not survey.groups:
        raise UserError(f"{source}: no group in it that can be used: {'; '.join(survey.reasons)}")
    unusable = survey.rows - survey.groups
    return _candidates(source), sum(k * count for k, count in survey.candidates.items()) + unusable


def parse(line: str, where: str) -> dict[str, Any]:
    """A line's object. Raises UserError where it is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _known(source: str | Path, path: Path) -> bool:
    return str(source).startswith("testbed:") or any(reader.detects(path) for reader in readers.READERS.values())


def _is_preferences(file: Path) -> bool:
    if file.suffix == ".json":
        return True
    try:
        with open(file, encoding="utf-8-sig") as lines:
            row = json.loads(next((line for line in lines if line.strip()), "{}"))
    except ValueError:  # no UTF-8 or no JSON
        return False  # the list's own reader says what is wrong
    return isinstance(row, dict) and any(key in row for key in GROUP_KEYS)


def _lines(file: Path) -> list[Entry]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); expected a list of images") from error
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            entries.append(_entry(parse(line, f"{file}, line {number}"), file, f"{file}, line {number}"))
    if not entries:
        raise UserError(f"{file}: no image listed")
    return entries


def _rows(file: Path, names: set[str]) -> Iterator[Entry]:
    for number, row in enumerate(parquet.rows(file, [key for key in (*IMAGE_KEYS, *PROMPT_KEYS) if key in names])):
        yield _entry(row, file, f"{file}, row {number}", number)


def _entry(row: dict[str, Any], file: Path, where: str, number: int = 0) -> Entry:
    key = next((key for key in IMAGE_KEYS if row.get(key) is not None), None)
    value = None if key is None else row[key]
    name = None
    if isinstance(value, dict):  # the Image feature of `datasets`
        name, value = value.get("path"), value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        found = {key: row[key] for key in IMAGE_KEYS if key in row} or f"the keys {', '.join(row)}"
        raise UserError(f"{where}: expected a path under 'image', found {found}")
    prompt = next((row[key] for key in PROMPT_KEYS if key in row), None)
    if not isinstance(prompt, str) or not prompt.strip() or has_lone_surrogate(prompt):
        raise UserError(f"{where}: expected text under 'prompt', found {prompt!r}")
    if has_lone_surrogate(f"{value if isinstance(value, str) else name}"):
        raise UserError(f"{where}: expected a path under 'image', found {value!r}")
    if isinstance(value, bytes):
        return Entry(name or f"{file.name}:{number}", value, prompt)
    return Entry(value, file.parent / value, prompt)


def _candidates(source: str | Path) -> Iterator[Entry]:
    """In the source's order; a row that cannot be used is one entry that says why."""
    for item in readers.read(source, best_first=False):
        if isinstance(item, Group):
            for place, media in enumerate(item.candidates):
                yield Entry(f"{item.id}#{place}", media, item.prompt)
        else:
            yield Entry(f"{item.id} ({item.origin})", b"", "", item.reason)


def _stored(store: Store) -> Iterator[Entry]:
    """Best first, which is how they are stored."""
    for number in range(len(store)):
        shard, row = store.group(number)
        prompt = shard.groups["prompt"][row].as_py()
        for place, media in enumerate(store.media(number)):
            yield Entry(f"{shard.ids[row].as_py()}#{place}", media, prompt)
