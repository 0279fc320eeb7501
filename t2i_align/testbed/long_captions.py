"""Long captions of scenes: 6 to 11 sentences about two or three objects, each sentence a caption of the short kind.

    A red circle. On a gray background, a blue square. A large red circle. A blue square above a red circle. ...

Each sentence states one fact, an object, its size, how two stand to each other or the background, and names objects by
colour and shape, which no two share. The last one's is stated nowhere else: whoever reads only the beginning cannot
know it.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from t2i_align.testbed import captions
from t2i_align.testbed.captions import CaptionError, Phrase, Statement
from t2i_align.testbed.scenes import Scene, relation_between, sample_scene

TRIPLES = 0.6  # share of the scenes


@dataclasses.dataclass(frozen=True)
class LongStatement:
    """What a long caption states, sentence by sentence."""

    sentences: tuple[Statement, ...]

    @property
    def facts(self) -> frozenset[Statement]:
        """Each fact once, as the shortest statement of it."""
        return frozenset(fact for sentence in self.sentences for fact in facts_of(sentence))

    @property
    def phrases(self) -> tuple[Phrase, ...]:
        """The objects, each with its size if that is stated, in a fixed order."""
        single = [fact.phrases[0] for fact in self.facts if len(fact.phrases) == 1]
        sized = {bare(phrase): phrase for phrase in sorted(single, key=lambda phrase: phrase.size or "")}
        return tuple(sorted(sized.values(), key=repr))

    @property
    def last(self) -> frozenset[Statement]:
        """The facts that the last sentence alone states."""
        return facts_of(self.sentences[-1]) - LongStatement(self.sentences[:-1]).facts

    def canonical(self) -> LongStatement:
        """The same statement whatever its phrasing and order."""
        return LongStatement(tuple(sorted(self.facts, key=repr)))


def bare(phrase: Phrase) -> Phrase:
    return dataclasses.replace(phrase, size=None)


def facts_of(sentence: Statement) -> frozenset[Statement]:
    """The facts in a sentence: its objects, their sizes, the relation, the background."""
    facts = {Statement((bare(phrase),)) for phrase in sentence.phrases}
    facts |= {Statement((phrase,)) for phrase in sentence.phrases if phrase.size}
    if sentence.relation:
        first, second = sentence.phrases
        facts.add(Statement((bare(first), bare(second)), sentence.relation).canonical())
    if sentence.background:
        facts.add(Statement((), background=sentence.background))
    return frozenset(facts)


def sample(rng: np.random.Generator) -> Scene:
    """A random scene of two or three objects, of which no two share a colour or a shape."""
    return sample_scene(rng, "triple" if rng.random() < TRIPLES else "pair")


def describe(scene: Scene, rng: np.random.Generator) -> LongStatement:
    """All that is true of a scene of `sample`, in random order; of some triples the third object comes last."""
    items = scene.stated_objects
    objects = [Phrase(item.shape, item.colour) for item in items]
    sized = [dataclasses.replace(phrase, size=item.size) for phrase, item in zip(objects, items, strict=True)]
    sizes = [Statement((phrase,)) for phrase in sized]
    relations = [
        Statement((objects[i], objects[j]), relation)
        for i, j in itertools.combinations(range(len(items)), 2)
        if (relation := relation_between(items[i].x - items[j].x, items[i].y - items[j].y))
    ]
    background = [Statement((objects[rng.integers(2)],), background=scene.background)]
    kinds = [kind for kind in (sizes, relations, background) if kind]
    which = int(rng.integers(len(kinds) + (len(items) > 2)))
    sentences = [*(Statement((phrase,)) for phrase in objects), *sizes, *relations, *background]
    if which == len(kinds):
        last = sizes[2]
        sentences = [one for one in sentences if objects[2] not in map(bare, one.phrases)]
    else:
        last = kinds[which][rng.integers(len(kinds[which]))]
        sentences.remove(last)
        if len(items) > 2:
            sentences.append(Statement(tuple(objects)))
    return LongStatement((*(sentences[i] for i in rng.permutation(len(sentences))), last))


def write(statement: LongStatement, rng: np.random.Generator) -> str:
    """Phrase each sentence in one of its templates, drawn at random."""
    texts = [captions.write(sentence, rng) for sentence in statement.sentences]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in texts)


def parse(caption: str) -> LongStatement:
    """Read a caption back into what it states.

    Raises:
        CaptionError: a sentence that is none of this world, several objects in one phrase, or a contradiction.
    """
    texts = [text for text in caption.split(".") if text.strip()] or [caption]
    statement = LongStatement(tuple(captions.parse(text) for text in texts))
    if any(phrase.number > 1 for sentence in statement.sentences for phrase in sentence.phrases):
        raise CaptionError(
            f"cannot read the prompt {caption!r}: a long caption names each object, not a number of them"
        )
    # What excludes each other: two sizes of an object, two relations of a pair, two backgrounds.
    stated = [
        (frozenset(map(bare, fact.phrases)), fact.relation is None)
        for fact in statement.facts
        if fact.background or fact.relation or fact.phrases[0].size
    ]
    if len(set(stated)) < len(stated):
        raise CaptionError(f"cannot read the prompt {caption!r}: its sentences contradict each other")
    return statement
