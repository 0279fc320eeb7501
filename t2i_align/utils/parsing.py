"""JSON from a text, and what all readers of files check, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2i_align.errors import UserError


def parse_json(text: str | bytes, origin: str) -> Any:
    """A JSON value, in UTF-8 where it is bytes; raises UserError, which names `origin`, for anything else.

    A key that an object has twice is an error, as it is in YAML: of two values, programs take different ones.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not valid JSON: {error}") from error


def as_object(value: Any, origin: str, expected: str = "an object") -> dict[str, Any]:
    """The value if it is a JSON object; raises UserError, which names `origin`, for anything else."""
    if not isinstance(value, dict):
        raise UserError(f"{origin}: expected {expected}, found {type(value).__name__}")
    return value


def check_not_empty(file: Path) -> None:
    """Raise UserError where a file has no content."""
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")


def check_distinct(file: Path, names: Sequence[str]) -> None:
    """Raise UserError where two columns of a file have one name."""
    if len(set(names)) < len(names):
        raise UserError(f"{file}: two columns of the same name among {', '.join(names)}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")
    return values
