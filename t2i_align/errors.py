"""The one exception a person is meant to read: bad input, named, before long work starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot be used. The command line prints its message alone and exits with status 2."""


def unknown(what: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a misspelt name or key: says what was found, the nearest match and every choice."""
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}.{hint} Choices: {', '.join(known) or 'none'}.")
