"""Rule-based perturber: changes what a caption states, by known words and a little grammar.

Four kinds of edits: `attribute` (another colour, size, material or shape), `count` (another number), `relation` (the
opposite place) and `exchange` (two objects exchange colours, sizes or materials). In doubt a word is left alone: an
edit that breaks the grammar teaches a model to recognise bad English, not a wrong image.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from t2i_align.errors import UserError, unknown
from t2i_align.labeling import words as w

KINDS = ("attribute", "count", "relation", "exchange")
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*|\d+")
_PHRASES = sorted({*w.RELATIONS, *(phrase for axis in w.AXES for phrase in axis)}, key=len, reverse=True)
_RELATION = re.compile(  # whole words in the sense of _WORD, the longest phrase first
    rf"(?<![^\W\d_])(?<![^\W\d_][-'’])(?:{'|'.join(_PHRASES)})(?![-'’]?[^\W\d_])".replace(" ", r"\s+"), re.IGNORECASE
)


class Change(NamedTuple):
    """Replacement of the characters [start, stop) of a caption, in lower case."""

    start: int
    stop: int
    text: str


Place = list[tuple[Change, ...]]  # alternatives, each a set of changes to the same characters


@dataclass(frozen=True, kw_only=True)
class RulePerturber:
    """Captions to captions that contradict them, each a function of the caption and its seed alone.

    Args:
        kinds: of edits, equally likely where a caption allows them.
        strength: number of edits; fewer where a caption allows fewer, and None instead of a caption that allows none.

    Raises:
        UserError: an unknown kind, none at all, or a strength below 1.
    """

    kinds: Sequence[str] = KINDS
    strength: int = 1
    name: str = field(default="rules", init=False)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of edit", kind, KINDS)
        if not self.kinds:
            raise UserError(f"kinds: none given. Choices: {', '.join(KINDS)}.")
        if self.strength < 1:
            raise UserError(f"strength must be a whole number of at least 1, found {self.strength!r}")

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        return [self._perturb(caption, random.Random(seed)) for caption, seed in zip(captions, seeds, strict=True)]

    def _perturb(self, caption: str, rng: random.Random) -> str | None:
        text = Text(caption)
        places = {kind: list(text.places(kind)) for kind in KINDS if kind in self.kinds}
        changes: list[Change] = []
        for _ in range(self.strength):
            free = {kind: [one for one in places[kind] if not _overlap(one[0], changes)] for kind in places}
            if not any(free.values()):
                break
            kind = rng.choice([kind for kind in free if free[kind]])
            changes += rng.choice(rng.choice(free[kind]))
        return text.changed(changes) if changes else None


class Text:
    """A caption as words, and the places where each kind of edit is possible."""

    def __init__(self, caption: str) -> None:
        self.caption = caption
        self.spans = [match.span() for match in _WORD.finditer(caption)]
        self.words = [caption[start:stop].lower() for start, stop in self.spans]

    def places(self, kind: str) -> Iterator[Place]:
        """Where an edit of this kind is possible; they may overlap."""
        finders = (self._attributes, self._counts, self._relations, self._exchanges)
        return dict(zip(KINDS, finders, strict=True))[kind]()

    def changed(self, changes: Sequence[Change]) -> str:
        """The caption with these changes; "a" and "an" before them are corrected, and capitals kept."""
        changed = {change.start for change in changes}
        articles = []
        for change in changes:
            before = next(i for i, (start, _) in enumerate(self.spans) if start == change.start) - 1
            if before < 0 or not self._joined(before) or self.spans[before][0] in changed:
                continue
            if self.words[before] in w.ARTICLES:
                articles.append(self._change(before, w.article(change.text)))
        text = self.caption
        for change in sorted([*changes, *articles], key=lambda change: -change.start):
            new = w.like(text[change.start : change.stop], change.text)
            text = text[: change.start] + new + text[change.stop :]
        return text

    def _attributes(self) -> Iterator[Place]:
        for i, word in enumerate(self.words):
            singular = w.PLURALS.get(word, word)
            if word in w.ADJECTIVES and self._is_adjective(i):
                yield [(self._change(i, other),) for other in self._absent(w.ADJECTIVES[word])]
            elif singular in w.SHAPES and self._is_noun(i):
                others = self._absent(w.SHAPES[singular])
                yield [(self._change(i, other if word == singular else w.plural(other)),) for other in others]

    def _counts(self) -> Iterator[Place]:
        for i, word in enumerate(self.words):
            phrase = self._phrase(i + 1)
            if word in w.NUMBERS and self._stands_alone(i) and any(map(_looks_plural, phrase)):
                yield [(self._change(i, other),) for other in w.NUMBERS[word]]
            elif word in (*w.ARTICLES, "one") and (noun := self._countable(i)) is not None:
                several = self._change(noun, w.plural(self.words[noun]))
                yield [(self._change(i, number), several) for number in w.MANY]

    def _relations(self) -> Iterator[Place]:
        together: list[list[Change]] = [[] for _ in w.AXES]
        for match in _RELATION.finditer(self.caption):
            phrase = " ".join(match[0].lower().split())
            axis = next((k for k, axis in enumerate(w.AXES) if phrase in axis), None)
            if axis is not None:
                together[axis].append(Change(*match.span(), w.AXES[axis][phrase]))
            elif phrase in w.RELATIONS:
                yield [(Change(*match.span(), w.RELATIONS[phrase]),)]
        yield from ([tuple(changes)] for changes in together if changes)

    def _exchanges(self) -> Iterator[Place]:
        for table in (w.COLOURS, w.SIZES, w.MATERIALS):
            places = [i for i, word in enumerate(self.words) if word in table and not self._closes(i)]
            # A background is no object, and the testbed's objects never have a background's colour.
            places = [i for i in places if self._head(i) != "background"]
            for i, j in combinations(places, 2):
                one, two = self.words[i], self.words[j]
                contrast = two in table[one] or one in table[two] if table is w.SIZES else not w.alike(one, two)
                if contrast and self._head(i) != self._head(j):
                    yield [(self._change(i, two), self._change(j, one))]

    # Grammar --------------------------------------------------------------------------------------------------------

    def _change(self, i: int, text: str) -> Change:
        return Change(*self.spans[i], text)

    def _absent(self, words: Sequence[str]) -> Sequence[str]:
        """Words that the caption does not have yet, else all: "red" for "blue" may fit a red neighbour."""
        present = {w.PLURALS.get(word, word) for word in self.words}
        return [word for word in words if word not in present] or words

    def _joined(self, i: int) -> bool:
        """Whether only space separates a word from the next."""
        return i + 1 < len(self.words) and self.caption[self.spans[i][1] : self.spans[i + 1][0]].isspace()

    def _closes(self, i: int) -> bool:
        """Whether a noun phrase that reaches this word ends with it."""
        return not self._joined(i) or self.words[i + 1] in w.FUNCTION_WORDS

    def _phrase(self, i: int) -> list[str]:
        """The words from `i` to the end of their noun phrase."""
        stop = i
        while stop < len(self.words) and not self._closes(stop):
            stop += 1
        return self.words[i : stop + 1] if i > 0 and self._joined(i - 1) else []

    def _head(self, i: int) -> str:
        """The word that an adjective describes: the next one that is no adjective."""
        return next((word for word in self.words[i + 1 :] if word not in w.ADJECTIVES), "")

    def _is_adjective(self, i: int) -> bool:
        before = self.words[i - 1] if i else ""
        after = self.words[i + 1 : i + 3]
        listed = len(after) == 2 and after[0] in ("and", "or") and after[1] in w.ADJECTIVES
        return not self._closes(i) or before in w.COPULAS or listed

    def _is_noun(self, i: int) -> bool:
        before = self.words[i - 1] if i and self._joined(i - 1) else ""
        described = before in w.ADJECTIVES or before in w.NUMBERS or before in (*w.ARTICLES, "the", "one")
        return described and self._closes(i)

    def _stands_alone(self, i: int) -> bool:
        """Whether this word is a whole number, not part of one as in 2.5 or 16:9."""
        start = self.spans[i][0]
        return self._joined(i) and (start == 0 or self.caption[start - 1].isspace())

    def _countable(self, i: int) -> int | None:
        """Index of the noun of "a large red circle", if its plural needs no other verb."""
        before = self.words[i - 1] if i else ""
        noun = i + 1
        while noun < len(self.words) and self.words[noun] in w.ADJECTIVES and not self._closes(noun):
            noun += 1
        if noun >= len(self.words) or self.words[noun] not in w.NOUNS or not self._joined(i) or before in w.COPULAS:
            return None
        closed = self._closes(noun) or self.words[noun + 1].endswith("ing")
        return noun if closed and not self._agrees_with(noun) else None

    def _agrees_with(self, noun: int) -> bool:
        """Whether a later word of the sentence may be a singular verb or pronoun ("sits", "its")."""
        end = re.compile("[.!?;]").search(self.caption, self.spans[noun][1])
        for i in range(noun + 1, len(self.words)):
            word = self.words[i]
            if end and self.spans[i][0] > end.start():
                return False
            if word in ("is", "was") and self.words[i - 1] == "there":
                continue
            if word in ("it", "he", "she", "him", "her") or (word.endswith("s") and not _is_no_verb(word)):
                return True
        return False


def _overlap(changes: Sequence[Change], others: Sequence[Change]) -> bool:
    return any(a.start < b.stop and b.start < a.stop for a in changes for b in others)


def _looks_plural(word: str) -> bool:
    return word in w.PLURALS or (word.endswith("s") and not word.endswith("ss"))


def _is_no_verb(word: str) -> bool:
    return word.endswith("ss") or word in w.PLURALS or word in w.NOUNS
