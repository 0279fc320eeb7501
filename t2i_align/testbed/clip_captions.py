"""Captions of clips: what a caption states of objects, paths, speeds and background, and how it is read back."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from t2i_align.testbed.captions import NOUN, CaptionError, Phrase, clean, noun_words, read_noun
from t2i_align.testbed.clips import SPEEDS, Clip
from t2i_align.testbed.scenes import BACKGROUNDS

WAYS = {  # verb and direction of each path; the speed's word stands between them
    "right": ("moving", "to the right"),
    "left": ("moving", "to the left"),
    "up": ("moving", "upwards"),
    "down": ("moving", "downwards"),
    "clockwise": ("circling", "clockwise"),
    "anticlockwise": ("circling", "anticlockwise"),
    "sideways": ("bouncing", "from side to side"),
    "vertically": ("bouncing", "up and down"),
    "still": ("standing", "still"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One object and its path (`clips.PATHS`); `speed` None where it stands still or the caption leaves it open."""

    phrase: Phrase
    path: str
    speed: str | None = None


@dataclasses.dataclass(frozen=True)
class ClipStatement:
    """What a caption states of a clip; `background` None: not stated."""

    parts: tuple[Part, ...]
    background: str | None = None

    def canonical(self) -> ClipStatement:
        """The same statement whatever its phrasing: what moves comes first."""
        return dataclasses.replace(self, parts=tuple(sorted(self.parts, key=lambda p: (p.path == "still", repr(p)))))


def describe(
    clip: Clip, rng: np.random.Generator, *, p_size: float = 0.6, p_speed: float = 0.8, p_background: float = 0.8
) -> ClipStatement:
    """A true statement about a clip that leaves out some sizes, speeds and backgrounds."""
    parts = []
    for mover in clip.movers:
        size = mover.item.size if rng.random() < p_size else None
        speed = mover.speed if rng.random() < p_speed else None
        parts.append(Part(Phrase(mover.item.shape, mover.item.colour, size), mover.path, speed))
    return ClipStatement(tuple(parts), clip.background if rng.random() < p_background else None)


def _motion(path: str, speed: str | None) -> str:
    verb, way = WAYS[path]
    return f"{verb} {speed} {way}" if speed else f"{verb} {way}"


MOTIONS = {
    _motion(path, speed): (path, speed)
    for path in WAYS
    for speed in (None, *SPEEDS)
    if speed is None or path != "still"
}
_PART = rf"({NOUN}) ({'|'.join(MOTIONS)})"
_CAPTION = re.compile(
    rf"(?:on an? (?P<first>{'|'.join(BACKGROUNDS)}) background, )?{_PART}(?: and {_PART})?"
    rf"(?: on an? (?P<last>{'|'.join(BACKGROUNDS)}) background)?"
)


def write(statement: ClipStatement, rng: np.random.Generator) -> str:
    """Phrase a statement: two objects in any order, the background first or last."""
    parts = [f"{noun_words(part.phrase)} {_motion(part.path, part.speed)}" for part in statement.parts]
    text = " and ".join(str(part) for part in rng.permutation(parts))
    if statement.background is None:
        return text
    place = f"on a {statement.background} background"
    return f"{place}, {text}" if rng.random() < 0.5 else f"{text} {place}"


def parse(caption: str) -> ClipStatement:
    """Read a caption back into what it states, in canonical order.

    Raises:
        CaptionError: the caption is no sentence about this world's clips; quotes it and gives an example.
    """
    match = _CAPTION.fullmatch(clean(caption))
    if match is None or (match["first"] and match["last"]) or re.search(r"\b(two|three) ", caption.lower()):
        raise CaptionError(
            f"cannot read the prompt {caption!r}: the testbed's video captions are such as "
            "'a large red circle moving quickly to the right on a white background'"
        )
    parts = [Part(read_noun(match[i]), *MOTIONS[match[i + 1]]) for i in (2, 4) if match[i]]
    return ClipStatement(tuple(parts), match["first"] or match["last"]).canonical()
