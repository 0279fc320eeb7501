"""The vocabulary of the rule-based perturber, and the little grammar that replacing its words takes.

A word may be recognised without being a replacement: "teal" becomes one of COLOURS, nothing becomes teal. Replacements
are plain words, among them all those of the testbed.
"""

from __future__ import annotations

import re

# Attributes ---------------------------------------------------------------------------------------------------------
# For each recognised word its replacements, without near synonyms ("navy", "blue").

_HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
_SHADES = ("white", "gray", "black")
_MATERIALS = ("wooden", "metal", "plastic", "glass", "stone", "paper")
_SEEN_MATERIALS = (*_MATERIALS, "leather", "ceramic", "marble", "concrete", "brick", "cotton", "velvet", "bronze")
_NEAR = {
    "scarlet": "red", "crimson": "red", "maroon": "red purple", "brown": "orange red", "golden": "yellow orange",
    "beige": "yellow orange", "olive": "green yellow", "lime": "green yellow", "teal": "cyan green blue",
    "turquoise": "cyan green blue", "azure": "blue cyan", "navy": "blue", "indigo": "blue purple",
    "violet": "purple pink", "magenta": "pink purple", "lavender": "purple pink", "grey": "gray", "marble": "stone",
    "concrete": "stone", "brick": "stone", "bronze": "metal", "ceramic": "glass stone",
}  # fmt: skip


def alike(word: str, other: str) -> bool:
    """Whether two attributes are too similar to contradict each other."""
    return bool({word, *_NEAR.get(word, "").split()} & {other, *_NEAR.get(other, "").split()})


def _others(words: tuple[str, ...], offered: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {word: tuple(other for other in offered if not alike(word, other)) for word in words}


COLOURS: dict[str, tuple[str, ...]] = {
    **_others((*_HUES, *(word for word in _NEAR if word not in (*_SEEN_MATERIALS, "grey"))), _HUES),
    **_others((*_SHADES, "grey"), _SHADES),
}
MATERIALS = _others(_SEEN_MATERIALS, _MATERIALS)
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("large",), "large": ("small",), "big": ("small",), "little": ("big",), "tiny": ("huge",),
    "huge": ("tiny",), "giant": ("tiny",), "gigantic": ("tiny",), "enormous": ("tiny",), "tall": ("short",),
    "long": ("short",), "wide": ("narrow",), "narrow": ("wide",), "thick": ("thin",), "thin": ("thick",),
}  # fmt: skip
_FORMS = ("round", "square", "triangular", "rectangular")
FORMS = {
    **_others(_FORMS, _FORMS),
    "circular": ("square", "triangular"),
    "oval": ("square", "triangular"),
}  # adjectives
_FLAT, _SOLID = ("circle", "square", "triangle", "diamond", "cross"), ("cube", "sphere", "cylinder", "cone")
SHAPES: dict[str, tuple[str, ...]] = {  # as nouns; FORMS are adjectives
    **_others(_FLAT, _FLAT),
    **_others(_SOLID, _SOLID),
    "rectangle": ("circle", "triangle", "cross"),
    "hexagon": ("square", "triangle", "cross"),
}
ADJECTIVES = {**COLOURS, **SIZES, **MATERIALS, **FORMS}

# Replacements of numbers. Three only becomes two: the testbed counts no further.
NUMBERS: dict[str, tuple[str, ...]] = {
    "two": ("three",), "three": ("two",), "four": ("two", "three", "six"), "five": ("two", "three", "seven"),
    "six": ("three", "four", "eight"), "seven": ("three", "four", "five"), "eight": ("three", "four", "five"),
    "nine": ("three", "four", "five"), "ten": ("three", "four", "five"), "2": ("3",), "3": ("2",), "4": ("2", "3", "6"),
    "5": ("2", "3", "7"), "6": ("3", "4", "8"), "7": ("3", "4", "5"), "8": ("3", "4", "5"), "9": ("3", "4", "5"),
}  # fmt: skip
MANY = ("two", "three")  # replacements of one

# Places: phrases and their opposites. All phrases of one entry of AXES are replaced together, so that "on the left a
# cat, on the right a dog" does not end with both on one side; RELATIONS are replaced one by one.
AXES: tuple[dict[str, str], ...] = (
    {"on the left": "on the right", "on the right": "on the left"},
    {"at the top": "at the bottom", "at the bottom": "at the top"},
    {"in the foreground": "in the background", "in the background": "in the foreground"},
)
RELATIONS = {
    "to the left of": "to the right of", "to the right of": "to the left of", "left of": "right of",
    "right of": "left of", "above": "below", "below": "above", "on top of": "underneath", "underneath": "on top of",
    "under": "on top of", "beneath": "above", "in front of": "behind", "behind": "in front of", "inside": "outside",
    "outside": "inside",
}  # fmt: skip

# Grammar ------------------------------------------------------------------------------------------------------------

ARTICLES = ("a", "an")
COPULAS = ("is", "are", "was", "were")
# One of these words, punctuation or the end of the text closes a noun phrase; the word before it is the noun.
FUNCTION_WORDS = frozenset(
    "a about above across after against along among an and are around as at atop be before behind below beneath beside "
    "between beyond but by down during for from has have her his in inside into is it its near next of off on onto or "
    "out outside over past that the their there through to toward under underneath up was were which while who with "
    "within without".split()
)
_IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "wolf": "wolves",
    "knife": "knives", "leaf": "leaves", "shelf": "shelves",
}  # fmt: skip
_REGULAR = (
    "apple baby ball balloon banana bear bed bench bicycle bike bird boat book bottle bowl box boy bridge building bus "
    "butterfly cake car cat chair church clock cloud cow cup dog donut door dragon elephant flag flower fox frog "
    "giraffe girl guitar hat horse house kite kitten lamp monkey motorcycle mountain mug owl penguin phone pizza plane "
    "plate puppy rabbit robot sandwich ship sofa spoon star suitcase table teapot tiger tower train tree truck "
    "umbrella vase violin window zebra"
)
NOUNS = frozenset((*_REGULAR.split(), *_IRREGULAR, *SHAPES))


def plural(noun: str) -> str:
    """The plural of a noun in NOUNS."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
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
