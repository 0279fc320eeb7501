"""Paths in rows: they stay in their folder, whatever system wrote them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_align.errors import UserError, shown


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


def natural(name: str) -> tuple[list[Any], str]:
    """A sort key in which numbers count as such: 2.png comes before 10.png."""
    parts = [part.lstrip("0") if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]
    return [(len(part), part) if place % 2 else part for place, part in enumerate(parts)], name
