"""Long texts in segments that a text encoder reads whole: sentences, or parts of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import sentencex


def split(prompt: str, length: Callable[[str], int], limit: int) -> Iterator[str]:
    """A prompt's segments: lines, in these sentences and what semicolons divide; halved at words where beyond `limit`.

    An empty prompt is one empty segment. No text is lost but blanks.
    """
    found = False
    for line in prompt.splitlines():
        for sentence in sentencex.segment("en", line):
            for clause in re.split(r"(?<=[;；])\s*", sentence):
                if clause.strip():
                    found = True
                    yield from _halved(clause.strip(), length, limit)
    if not found:
        yield ""


def _halved(text: str, length: Callable[[str], int], limit: int) -> Iterator[str]:
    """A text in parts of at most `limit` tokens, divided at the blank nearest to the middle, or within a long word."""
    if length(text) <= limit or len(text) < 2:
        yield text
        return
    middle = len(text) // 2
    blanks = [found.start() for found in re.finditer(r"\s", text)]
    at = min(blanks, key=lambda place: abs(place - middle), default=middle)
    for half in (text[:at].strip(), text[at:].strip()):
        yield from _halved(half, length, limit)
