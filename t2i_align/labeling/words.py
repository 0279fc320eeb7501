"""The vocabulary of the rule-based perturber (assets/words.yaml), and the grammar that replacing its words takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[1] / "assets" / "words.yaml"
_WORDS: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
Replacements = dict[str, tuple[str, ...]]


def alike(word: str, other: str) -> bool:
    """Whether two attributes are too similar to contradict each other."""
    near = _WORDS["near"]
    return bool({word, *near.get(word, "").split()} & {other, *near.get(other, "").split()})


def _others(words: str, replacements: str) -> Replacements:
    """For each word all replacements that contradict it."""
    return {word: tuple(other for other in replacements.split() if not alike(word, other)) for word in words.split()}


def _listed(table: Mapping[str, str]) -> Replacements:
    return {word: tuple(others.split()) for word, others in table.items()}


_MATERIALS = f"{_WORDS['materials']} {_WORDS['other_materials']}"
_NEAR_HUES = " ".join(word for word in _WORDS["near"] if word not in (*_MATERIALS.split(), "grey"))
COLOURS: Replacements = {
    **_others(f"{_WORDS['hues']} {_NEAR_HUES}", _WORDS["hues"]),
    **_others(f"{_WORDS['shades']} grey", _WORDS["shades"]),
}
MATERIALS = _others(_MATERIALS, _WORDS["materials"])
SIZES = _listed(_WORDS["sizes"])
FORMS = _others(_WORDS["forms"], _WORDS["forms"]) | _listed(_WORDS["other_forms"])
SHAPES: Replacements = {
    **_others(_WORDS["flat_shapes"], _WORDS["flat_shapes"]),
    **_others(_WORDS["solid_shapes"], _WORDS["solid_shapes"]),
    **_listed(_WORDS["other_shapes"]),
}
ADJECTIVES = {**COLOURS, **SIZES, **MATERIALS, **FORMS}
NUMBERS = _listed(_WORDS["numbers"])
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
