"""Captions of drawn scenes: what a caption states, how it is phrased, and how it is read back.

A caption is a phrasing of a `Statement`. `parse` recovers the statement from the text alone, so the oracle needs
nothing but pixels and the prompt. Relations come in several phrasings, some of which name the place before the noun:
CLIP's text model is causal, hence "a red circle to the left of ..." gives the token "circle" no place, while "on the
left a red circle" does. `Phrase`, its words and its corruption serve the captions of clips as well.

The splits of the prompts hash the `repr` of statements (`prompts.split_of`): renaming a class or a field here moves
prompts between splits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from t2i_align.testbed.scenes import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    RADII,
    SHAPES,
    Scene,
    choose_other,
    compose,
    maybe_degrade,
    render,
)

NUMBERS = {1: "one", 2: "two", 3: "three"}
RELATION_WORDS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
FAULTS = ("colour", "shape", "size", "relation", "count", "background", "exchange")
CHOICES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(RADII)}  # of a phrase


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
    """A true statement about a scene; leaves stray objects out, and some sizes and backgrounds."""
    objects, number = scene.stated_objects, 1
    if scene.kind == "count":
        objects, number = objects[:1], len(objects)
    phrases = tuple(Phrase(o.shape, o.colour, o.size if rng.random() < p_size else None, number) for o in objects)
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
    return maybe_degrade(render(draw_for(statement, rng)), rng, degraded)


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def noun_words(phrase: Phrase) -> str:
    """As in "a large red circle" or "two red circles"."""
    noun = phrase.shape if phrase.number == 1 else plural(phrase.shape)
    words = " ".join([*([phrase.size] if phrase.size else []), phrase.colour, noun])
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
        templates = (
            f"{a} {RELATION_WORDS[here]} {b}",
            f"{RELATION_WORDS[here]} {b} there is {a}",
            f"{PLACES[here]} {a}, {PLACES[there]} {b}",
        )
        text = templates[rng.integers(3)]
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
    """Inverse of `noun_words`; a CaptionError for anything else."""
    number, *adjectives, noun = words.split()
    count = {"two": 2, "three": 3}.get(number, 1)
    shape = noun if count == 1 else noun.removesuffix("es" if noun.endswith("sses") else "s")
    phrase = Phrase(shape, adjectives[-1], adjectives[0] if len(adjectives) == 2 else None, count)
    if shape not in SHAPES or noun_words(phrase) != words:
        raise CaptionError(f'cannot read {words!r}: one object is "a red circle", several are "two red circles"')
    return phrase


def clean(caption: str) -> str:
    """Lower case, single spaces, no full stop."""
    return " ".join(caption.lower().strip().rstrip(".").split())


def parse(caption: str) -> Statement:
    """Read a caption back into what it states.

    Raises:
        CaptionError: the caption is no sentence of this world; quotes it and gives an example.
    """
    backgrounds, core = _BACKGROUND.findall(clean(caption)), _BACKGROUND.sub("", clean(caption))
    for form, pattern in _FORMS.items():
        match = pattern.fullmatch(core)
        if match is None or len(backgrounds) > 1:
            continue
        parts = match.groupdict()
        relation = None
        if form == "places":
            place = {words: name for name, words in PLACES.items()}
            relation = place[parts["here"]]
            if place[parts["there"]] != OPPOSITE[relation]:
                break
        elif form != "list":
            relation = {words: name for name, words in RELATION_WORDS.items()}[parts["relation"]]
        phrases = tuple(read_noun(parts[key]) for key in "abc" if parts.get(key))
        return Statement(phrases, relation, backgrounds[0] if backgrounds else None)
    raise CaptionError(
        f"cannot read the prompt {caption!r}: the testbed's oracle knows captions such as "
        "'a large red circle to the left of a blue square on a white background'"
    )


def wrong_phrase(phrase: Phrase, name: str, phrases: Sequence[Phrase], rng: np.random.Generator) -> Phrase:
    """The phrase with a colour or shape that none of `phrases` has, or with the other size."""
    taken = [phrase.size] if name == "size" else [getattr(other, name) for other in phrases]
    changes: dict[str, str] = {name: choose_other(rng, CHOICES[name], *taken)}
    return dataclasses.replace(phrase, **changes)  # type: ignore[arg-type]


def corrupt(statement: Statement, fault: str, rng: np.random.Generator) -> Statement | None:
    """The statement with one attribute wrong, or None where the fault does not apply to it.

    `exchange` swaps the colours of two phrases (the attribute leakage of real models); the other faults are named
    after the attribute they falsify (`FAULTS`). Only stated attributes are changed.
    """
    phrases, which = list(statement.phrases), int(rng.integers(len(statement.phrases)))
    with_size = [i for i, phrase in enumerate(phrases) if phrase.size]
    match fault:
        case "background" if statement.background:
            return dataclasses.replace(statement, background=choose_other(rng, BACKGROUNDS, statement.background))
        case "relation" if statement.relation:
            return dataclasses.replace(statement, relation=OPPOSITE[statement.relation])
        case "count" if len(phrases) == 1:
            number = int(rng.choice([n for n in NUMBERS if abs(n - phrases[0].number) == 1]))
            phrases[0] = dataclasses.replace(phrases[0], number=number)
        case "exchange" if len(phrases) > 1:
            first, second = phrases[which], phrases[(which + 1) % len(phrases)]
            phrases[which] = dataclasses.replace(first, colour=second.colour)
            phrases[(which + 1) % len(phrases)] = dataclasses.replace(second, colour=first.colour)
        case "size" if with_size:
            which = int(rng.choice(with_size))
            phrases[which] = wrong_phrase(phrases[which], "size", phrases, rng)
        case "colour" | "shape":
            phrases[which] = wrong_phrase(phrases[which], fault, phrases, rng)
        case _ if fault in FAULTS:
            return None
        case _:
            raise ValueError(f"unknown fault {fault!r}; the choices are {', '.join(FAULTS)}")
    return dataclasses.replace(statement, phrases=tuple(phrases))


def draw_wrong(statement: Statement, rng: np.random.Generator) -> Statement:
    """The statement with one attribute wrong, drawn at random."""
    while True:
        wrong = corrupt(statement, str(rng.choice(FAULTS)), rng)
        if wrong is not None:
            return wrong
