"""JSON Lines (or a .json list) with paths to images or clips, one group an entry:

    {"prompt": "a red fox", "chosen": "a.png", "rejected": "b.png"}
    {"prompt": "a red fox", "images": ["a.png", "b.png", "c.png"], "scores": [3, 1, 2]}
    {"prompt": "a red fox runs", "videos": ["a.mp4", "folder of frames"], "scores": [1, 0]}

Optional keys: "id", "user", "captions" (one per image), "negative_caption"; others are left alone. Paths are relative
to the file's own folder and may not leave it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_align.data.formats import exists, inside
from t2i_align.data.schema import Group, Items, Skipped
from t2i_align.errors import UserError

Entry = dict[str, Any]


def detects(path: Path) -> bool:
    """A file that ends in .jsonl or .json."""
    return path.is_file() and path.suffix in (".jsonl", ".json")


def files(path: Path) -> Iterator[Path]:
    """The file itself and the images and clips that it names."""
    yield path
    for _, origin, entry in entries(path):
        yield from (inside(path.parent, name, origin) for name in _images_and_scores(entry, origin)[0])


def read_jsonl(path: Path) -> Items:
    """Groups of a JSON Lines file or of a .json file with one list.

    Raises:
        UserError: an entry that is not valid JSON or lacks its keys (with its line), a path outside the folder.
    """
    for number, origin, entry in entries(path):
        yield _group(path, f"{path.name}:{number}", origin, entry)


def entries(path: Path) -> Iterator[tuple[int, str, Entry]]:
    """The objects of a file, with their numbers and what to call them in messages."""
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if path.suffix == ".json":
        entries = _parse(path.read_bytes(), str(path))
        if not isinstance(entries, list):
            raise UserError(f"{path}: a .json file must hold one list of entries, found {type(entries).__name__}")
        rows = ((number, f"{path}, entry {number}", entry) for number, entry in enumerate(entries))
        yield from ((number, origin, _mapping(entry, origin)) for number, origin, entry in rows)
        return
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                origin = f"{path}, line {number}"
                yield number, origin, _mapping(_parse(line, origin), origin)


def _parse(text: bytes, origin: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not valid JSON: {error}") from error


def _mapping(entry: Any, origin: str) -> Entry:
    if not isinstance(entry, dict):
        raise UserError(f"{origin}: expected an object with keys such as 'prompt', found {type(entry).__name__}")
    return entry


def _group(path: Path, default_id: str, origin: str, entry: Entry) -> Group | Skipped:
    group_id = str(entry["id"]) if entry.get("id") is not None else default_id
    prompt = text(entry, "prompt", origin)
    names, scores = _images_and_scores(entry, origin)
    captions = None
    if entry.get("captions") is not None:
        captions = tuple(texts(entry, "captions", origin))
        if len(captions) != len(names):
            raise UserError(f"{origin}: {len(names)} images, but {len(captions)} captions")
    images = tuple(inside(path.parent, name, origin) for name in names)
    for name, image in zip(names, images, strict=True):
        if not exists(image):  # a folder may hold the frames of a clip
            return Skipped(id=group_id, origin=origin, reason=f"no such image: {name}")
    if not all(math.isfinite(score) for score in scores):
        return Skipped(id=group_id, origin=origin, reason=f"scores must be finite numbers, found {scores}")
    user = entry.get("user")
    return Group(
        id=group_id,
        prompt=prompt,
        candidates=images,
        scores=tuple(scores),
        origin=origin,
        columns={
            "captions": captions,
            "negative_caption": None
            if entry.get("negative_caption") is None
            else text(entry, "negative_caption", origin),
            "user": None if user is None else str(user),
        },
    )


def _images_and_scores(entry: Entry, origin: str) -> tuple[list[str], list[float]]:
    if "chosen" in entry and "rejected" in entry:
        return [text(entry, "chosen", origin), text(entry, "rejected", origin)], [1.0, 0.0]
    key = "videos" if "videos" in entry else "images"
    if key not in entry or "scores" not in entry:
        raise UserError(
            f"{origin}: expected the keys 'prompt' with 'chosen' and 'rejected', or with 'images' (or 'videos') and "
            f"'scores'; found {', '.join(map(repr, entry)) or 'none'}"
        )
    names, scores = texts(entry, key, origin), numbers(entry, "scores", origin)
    if not names or len(names) != len(scores):
        raise UserError(f"{origin}: one score per image is needed, found {len(names)} {key} and {len(scores)} scores")
    return names, scores


def text(entry: Entry, key: str, origin: str) -> str:
    """The value of `key`, which must be text."""
    value = entry.get(key)
    if not isinstance(value, str):
        raise UserError(f"{origin}: {key!r} must be text, found {value!r}")
    return value


def texts(entry: Entry, key: str, origin: str) -> list[str]:
    """The value of `key`, which must be a list of texts."""
    values = _list(entry, key, origin)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{origin}: {key!r} must be a list of texts, found {values}")
    return values


def numbers(entry: Entry, key: str, origin: str) -> list[float]:
    """The value of `key`, which must be a list of numbers; they may be infinite or NaN."""
    values = _list(entry, key, origin)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UserError(f"{origin}: {key!r} must be numbers, found {values}")
    return [_float(value) for value in values]


def _list(entry: Entry, key: str, origin: str) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list):
        raise UserError(f"{origin}: {key!r} must be a list, found {value!r}")
    return value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no limit
        return math.inf
