"""Captions of drawn scenes: what a caption states, how it is phrased, and how it is read back.

A caption is a phrasing of a `Statement`. `parse` recovers the statement from the text alone, so the
oracle needs nothing but pixels and the prompt. Relations come in several phrasings, some of which name
the place before the noun: CLIP's text model is causal, hence "a red circle to the left of ..." gives
the token "circle" no place, while "on the left a red circle" does.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, OPPOSITE, RADII, SHAPES, Scene, compose, degrade, render

NUMBERS = {1: "one", 2: "two", 3: "three"}
RELATION_WORDS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
FAULTS = ("colour", "shape", "size", "relation", "count", "background", "exchange")


class CaptionError(ValueError):
    """The caption is not one of this world; the message quotes it."""


@dataclasses.dataclass(frozen=True)
class Phrase:
    """`number` objects of one shape and colour; `size` None where the caption leaves it open."""

    shape: str
    colour: str
    size: str | None = None
    number: int = 1


@dataclasses.dataclass(frozen=True)
class Statement:
    """What a caption states. The first phrase stands in `relation` to the second; None: not stated."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def count(self) -> int:
        return sum(phrase.number for phrase in self.phrases)

    def canonical(self) -> Statement:
        """The same statement whatever its phrasing: "right" and "below" turned round, triples sorted."""
        if self.relation in ("right", "below"):
            return Statement(self.phrases[::-1], OPPOSITE[self.relation], self.background)
        if self.relation is None:
            return dataclasses.replace(self, phrases=tuple(sorted(self.phrases, key=repr)))
        return self


def describe(scene: Scene, rng: np.random.Generator, *, p_size: float = 0.5, p_background: float = 0.6) -> Statement:
    """A true statement about a scene that leaves some sizes and backgrounds unsaid, and every stray object."""
    objects = scene.stated_objects
    if scene.kind == "count":
        first = objects[0]
        size = first.size if rng.random() < p_size else None
        phrases: tuple[Phrase, ...] = (Phrase(first.shape, first.colour, size, len(objects)),)
    else:
        phrases = tuple(Phrase(o.shape, o.colour, o.size if rng.random() < p_size else None) for o in objects)
    background = scene.background if rng.random() < p_background else None
    return Statement(phrases, scene.relation, background)


def draw_for(statement: Statement, rng: np.random.Generator) -> Scene:
    """A random scene of which the statement is true; what it leaves open is drawn at random."""
    while True:
        specs = []
        for phrase in statement.phrases:
            size = phrase.size or str(rng.choice(list(RADII)))
            specs += [(phrase.shape, phrase.colour, size)] * phrase.number
        background = statement.background or str(rng.choice(list(BACKGROUNDS)))
        objects = compose(rng, specs, statement.relation)
        if objects is not None:
            kind = "pair" if statement.relation else ("count", "single")[statement.count == 1]
            kind = "triple" if len(statement.phrases) == 3 else kind
            return Scene(kind, background, tuple(objects), statement.relation)


def draw_image(statement: Statement, rng: np.random.Generator, degraded: float = 0.0) -> np.ndarray:
    """An image [64, 64, 3] of which the statement is true, degraded with this probability."""
    return spoil(render(draw_for(statement, rng)), rng, degraded)


def spoil(pixels: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
    """The image, degraded with this probability."""
    return degrade(pixels, rng) if rng.random() < probability else pixels


def noun_words(phrase: Phrase) -> str:
    """As in "a large red circle" or "two red circles"."""
    adjectives = [phrase.size] if phrase.size else []
    noun = phrase.shape if phrase.number == 1 else phrase.shape + ("es" if phrase.shape.endswith("s") else "s")
    words = " ".join([*adjectives, phrase.colour, noun])
    if phrase.number > 1:
        return f"{NUMBERS[phrase.number]} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write(statement: Statement, rng: np.random.Generator) -> str:
    """Phrase a statement in one of the templates of its kind, drawn at random."""
    nouns = [noun_words(phrase) for phrase in statement.phrases]
    if statement.relation:
        a, b, here, there = *nouns, statement.relation, OPPOSITE[statement.relation]
        if rng.random() < 0.5:
            a, b, here, there = b, a, there, here
        template = int(rng.integers(3))
        if template == 0:
            text = f"{a} {RELATION_WORDS[here]} {b}"
        elif template == 1:
            text = f"{RELATION_WORDS[here]} {b} there is {a}"
        else:
            text = f"{PLACES[here]} {a}, {PLACES[there]} {b}"
    else:
        text = nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + " and " + nouns[-1]
        if rng.random() < 0.3:
            text = f"there {'are' if statement.phrases[0].number > 1 else 'is'} {text}"
    if statement.background is None:
        return text
    if rng.random() < 0.5:
        return f"on a {statement.background} background, {text}"
    comma = "," if text.startswith(("on the", "at the")) else ""
    return f"{text}{comma} on a {statement.background} background"


NOUN = rf"(?:an?|two|three) (?:(?:{'|'.join(RADII)}) )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})(?:es|s)?"
_BACKGROUND = re.compile(rf",? ?on a ({'|'.join(BACKGROUNDS)}) background,? ?")
_RELATION = "|".join(RELATION_WORDS.values())
_PLACE = "|".join(PLACES.values())
_FORMS = {
    "plain": re.compile(rf"(?P<a>{NOUN}) (?P<relation>{_RELATION}) (?P<b>{NOUN})"),
    "inverted": re.compile(rf"(?P<relation>{_RELATION}) (?P<b>{NOUN}) there is (?P<a>{NOUN})"),
    "places": re.compile(rf"(?P<here>{_PLACE}) (?P<a>{NOUN}), (?P<there>{_PLACE}) (?P<b>{NOUN})"),
    "list": re.compile(rf"(?:there (?:is|are) )?(?P<a>{NOUN})(?:, (?P<b>{NOUN}) and (?P<c>{NOUN}))?"),
}


def read_noun(words: str) -> Phrase:
    """What `noun_words` wrote; a CaptionError for anything else."""
    number, *adjectives, noun = words.split()
    count = {"two": 2, "three": 3}.get(number, 1)
    shape = noun if count == 1 else noun.removesuffix("es" if noun.endswith("sses") else "s")
    phrase = Phrase(shape, adjectives[-1], adjectives[0] if len(adjectives) == 2 else None, count)
    if shape not in SHAPES or noun_words(phrase) != words:
        raise CaptionError(f'cannot read {words!r}: one object is "a red circle", several are "two red circles"')
    return phrase


def parse(caption: str) -> Statement:
    """Read a caption back into what it states.

    Raises:
        CaptionError: the caption is no sentence of this world; quotes it and gives an example.
    """
    text = " ".join(caption.lower().strip().rstrip(".").split())
    backgrounds = _BACKGROUND.findall(text)
    core = _BACKGROUND.sub("", text)
    for form, pattern in _FORMS.items():
        match = pattern.fullmatch(core)
        if match is None or len(backgrounds) > 1:
            continue
        parts = match.groupdict()
        phrases = tuple(read_noun(parts[key]) for key in "abc" if parts.get(key))
        relation = None
        if form == "places":
            place = {words: name for name, words in PLACES.items()}
            relation = place[parts["here"]]
            if place[parts["there"]] != OPPOSITE[relation]:
                break
        elif form != "list":
            relation = {words: name for name, words in RELATION_WORDS.items()}[parts["relation"]]
        return Statement(phrases, relation, backgrounds[0] if backgrounds else None)
    raise CaptionError(
        f"cannot read the prompt {caption!r}: the testbed's oracle knows captions such as "
        "'a large red circle to the left of a blue square on a white background'"
    )


def _other(rng: np.random.Generator, choices: list[str], *taken: str | None) -> str:
    return str(rng.choice([c for c in choices if c not in taken]))


def corrupt(statement: Statement, fault: str, rng: np.random.Generator) -> Statement | None:
    """The statement with one attribute wrong, or None where the fault does not apply to it.

    `exchange` swaps the colours of two phrases (the attribute leakage of real models); the other faults
    are named after the attribute they falsify (`FAULTS`). Only stated attributes are touched.
    """
    phrases, which = list(statement.phrases), int(rng.integers(len(statement.phrases)))
    phrase = phrases[which]
    if fault == "background":
        if statement.background is None:
            return None
        return dataclasses.replace(statement, background=_other(rng, list(BACKGROUNDS), statement.background))
    if fault == "relation":
        if statement.relation is None:
            return None
        return dataclasses.replace(statement, relation=OPPOSITE[statement.relation])
    if fault == "size":
        stated = [i for i, p in enumerate(phrases) if p.size]
        if not stated:
            return None
        which = int(rng.choice(stated))
        phrases[which] = dataclasses.replace(phrases[which], size=_other(rng, list(RADII), phrases[which].size))
    elif fault == "colour":
        taken = [p.colour for p in phrases]
        phrases[which] = dataclasses.replace(phrase, colour=_other(rng, list(COLOURS), *taken))
    elif fault == "shape":
        taken = [p.shape for p in phrases]
        phrases[which] = dataclasses.replace(phrase, shape=_other(rng, list(SHAPES), *taken))
    elif fault == "count":
        if len(phrases) > 1:
            return None
        numbers = [n for n in NUMBERS if abs(n - phrase.number) == 1]
        phrases[0] = dataclasses.replace(phrase, number=int(rng.choice(numbers)))
    elif fault == "exchange":
        if len(phrases) < 2:
            return None
        other = (which + 1) % len(phrases)
        phrases[which] = dataclasses.replace(phrase, colour=phrases[other].colour)
        phrases[other] = dataclasses.replace(phrases[other], colour=phrase.colour)
    else:
        raise ValueError(f"unknown fault {fault!r}; the choices are {', '.join(FAULTS)}")
    return dataclasses.replace(statement, phrases=tuple(phrases))


def draw_wrong(statement: Statement, rng: np.random.Generator) -> Statement:
    """The statement with one attribute wrong, drawn at random."""
    while True:
        wrong = corrupt(statement, str(rng.choice(FAULTS)), rng)
        if wrong is not None:
            return wrong
