"""The vocabulary of the rule-based perturber (assets/words.yaml), and the grammar that replacing its words takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[1] / "assets" / "words.yaml"
_WORDS: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))


def alike(word: str, other: str) -> bool:
    """Whether two attributes are too similar to contradict each other."""
    near = _WORDS["near"]
    return bool({word, *near.get(word, "").split()} & {other, *near.get(other, "").split()})


def _table(name: str) -> dict[str, tuple[str, ...]]:
    """For each word of a table all replacements that contradict it."""
    return {
        word: tuple(other for other in others.split() if not alike(word, other))
        for words, others in _WORDS[name]
        for word in words.split()
    }


COLOURS, MATERIALS, SIZES, FORMS = map(_table, ("colours", "materials", "sizes", "forms"))
SHAPES, NUMBERS = map(_table, ("shapes", "numbers"))
ADJECTIVES = {**COLOURS, **SIZES, **MATERIALS, **FORMS}
MANY = tuple(_WORDS["many"].split())
AXES: tuple[dict[str, str], ...] = tuple(_WORDS["axes"])
RELATIONS: dict[str, str] = _WORDS["relations"]
ARTICLES = ("a", "an")
COPULAS = ("is", "are", "was", "were")
FUNCTION_WORDS = frozenset(_WORDS["function_words"].split())
NOUNS = frozenset((*_WORDS["nouns"].split(), *_WORDS["irregular_plurals"], *SHAPES))


def plural(noun: str) -> str:
    """The plural of a noun in NOUNS."""
    if noun in _WORDS["irregular_plurals"]:
        return str(_WORDS["irregular_plurals"][noun])
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


PLURALS = {plural(noun): noun for noun in NOUNS}


def article(word: str) -> str:
    """ "a" or "an" before one of the words here, none of which is an exception."""
    return "an" if word[0].lower() in "aeiou" else "a"


def like(pattern: str, word: str) -> str:
    """`word` capitalised like `pattern`: all letters, the first, or none."""
    if pattern.isupper() and len(pattern) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if pattern[0].isupper() else word
