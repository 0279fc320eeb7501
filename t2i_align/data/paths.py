"""Paths in rows: they stay in their folder, whatever system wrote them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_align.errors import UserError, shown

NO_PATH = re.compile(
    r"(?P<uri>data:)|(?P<address>\w+://)|(/9j/|iVBORw0KGgo|[A-Za-z0-9+/\s]{512})[A-Za-z0-9+/\s]*=*$"
)  # the last is base64, of JPEG, PNG or anything long


def spellings(name: str) -> Iterator[str]:
    """A path as it is, with Windows' separators as ours, and in the two ways that Unicode writes accents."""
    for separated in dict.fromkeys((name, name.replace("\\", "/"))):
        yield from dict.fromkeys((separated, *(unicodedata.normalize(form, separated) for form in ("NFC", "NFD"))))


def inside(root: Path, name: str, origin: str) -> Path:
    """The image or clip `name`, relative to `root`, as an absolute path.

    Raises:
        UserError: the path leaves `root` (absolute, through `..`, or through a symbolic link), or is no path at all.
    """
    try:
        base = root.resolve()
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a symlink loop, a null byte
        raise UserError(f"{origin}: {shown(name)} is not a usable path: {error}") from error
    if not path.is_relative_to(base):
        raise UserError(
            f"{origin}: {shown(name)} leads outside {base}. Name the folder in which all "
            "images lie as data.root, or as `root` in a dataset spec"
        )
    return path


def existing(value: Any, key: str, root: Path, origin: str) -> Path:
    """The image or clip whose path a row has under `key`, in whichever spelling it is there.

    Raises:
        ValueError: no path, or nothing there.
        UserError: a path that leaves `root`.
    """
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected an image or its path, found {shown(value)}")
    if match := NO_PATH.match(value):
        what = "a data URI" if match["uri"] else "an address" if match["address"] else "base64 text"
        raise ValueError(f"{key}: {what}, expected an image's bytes or its path; found {shown(value)}")
    path = next((path for name in spellings(value) if os.path.exists(path := inside(root, name, origin))), None)
    if path is None:
        raise ValueError(f"no such image: {value}")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"not a regular file: {value}")
    return path


def natural(name: str) -> tuple[list[Any], str]:
    """A sort key in which numbers count as such: 2.png comes before 10.png."""
    parts = [part.lstrip("0") if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]
    return [(len(part), part) if place % 2 else part for place, part in enumerate(parts)], name
