"""The exception for bad input, and its hints for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used. The command line prints its message alone and exits with status 2."""


def unknown(what: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a misspelt name: what was given, the nearest match and every choice."""
    known = sorted(choices)
    return UserError(f"unknown {what} {name!r}.{nearest(name, known)} Choices: {', '.join(known) or 'none'}.")


def shorten(text: str, length: int = 200) -> str:
    """A text for a message: its beginning, where it is longer than so many characters."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def nearest(name: object, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with the choice most like `name`, or "" where none is."""
    near = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
