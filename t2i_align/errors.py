"""The exception for bad input, its hints for misspelt names, and values as messages show them."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

MAX_MESSAGE = 4000  # characters; a file's keys and values may have any length
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class PrintableError(ValueError):
    """An error whose message, in which there may be names and values from anywhere, suits a terminal."""

    def __init__(self, message: str) -> None:
        text = printable(message)
        super().__init__(text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} …")

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # all that IPython and Jupyter show


class UserError(PrintableError):
    """Input that cannot be used. The command line prints its message alone and exits with status 2."""


def printable(text: str) -> str:
    """A text in which what a terminal would obey or cannot print is escaped; line ends and tabs stay."""
    return re.sub(r"(?![\n\t])[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: repr(match[0])[1:-1], text)


def shown(value: Any) -> str:
    """A value of any size as messages show it: `repr`, cut short."""
    return _SHORT.repr(value)


def unknown(what: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a misspelt name: what was given, the nearest match and every choice."""
    known = sorted(choices)
    return UserError(f"unknown {what} {name!r}.{nearest(name, known)} Choices: {', '.join(known) or 'none'}.")


def nearest(name: object, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with the choice most like `name`, or "" where none is."""
    near = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
