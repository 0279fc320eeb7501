"""The oracle for long captions: does the image show what all of the sentences state?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from t2i_align.testbed.captions import CHOICES, Statement
from t2i_align.testbed.long_captions import LongStatement, bare, facts_of, parse
from t2i_align.testbed.oracle import Oracle, Verdict, assign, likeness, qualities, relation_holds, shares, views_of
from t2i_align.testbed.vision import Seen, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongVerdict(Verdict):
    """A verdict on all sentences, [B] each. sentences: the share of them of which everything holds. last: the share of
    what the last sentence alone states; NaN where it states nothing new."""

    sentences: np.ndarray
    last: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        return {**super().columns(), "sentences": self.sentences, "last": self.last}


class LongOracle(Oracle):
    """Judges images against long captions; each stated fact counts once, however often it is stated."""

    def judge(self, pixels: Tensor | np.ndarray, prompts: Sequence[str]) -> LongVerdict:
        statements = [parse(prompt) for prompt in prompts]
        views = views_of(pixels, len(statements))
        rows, sentences, last = [], [], []
        for view, statement in zip(views, statements, strict=True):
            held = _held(view, statement)
            count = ("count", float(len(view.objects) == len(statement.phrases)))
            rows.append(shares(self.attributes, [count, *(part for parts in held.values() for part in parts.items())]))
            true = {fact for fact, parts in held.items() if all(value == 1 for value in parts.values())}
            sentences.append(np.mean([facts_of(sentence) <= true for sentence in statement.sentences]))
            new = [value for fact in statement.last for value in held[fact].values()]
            last.append(np.mean(new) if new else np.nan)
        grades = self._grades(rows, qualities(views))
        return LongVerdict(**grades, views=views, sentences=np.array(sentences, float), last=np.array(last, float))


def _held(view: View, statement: LongStatement) -> dict[Statement, dict[str, float]]:
    """For each fact by attribute 1.0 where it holds, else 0.0; objects are assigned so that most holds."""
    wanted, relations = statement.phrases, [fact for fact in statement.facts if fact.relation]
    places = {bare(phrase): place for place, phrase in enumerate(wanted)}

    def pair(fact: Statement, chosen: Sequence[Seen | None]) -> list[Seen | None]:
        return [chosen[places[phrase]] for phrase in fact.phrases]

    def score(chosen: Sequence[Seen | None]) -> float:
        looks = sum(likeness(phrase, item) for phrase, item in zip(wanted, chosen, strict=True) if item is not None)
        return looks + 0.5 * sum(relation_holds(fact, pair(fact, chosen)) for fact in relations)

    chosen = assign(view.objects, len(wanted), 6, score)
    held: dict[Statement, dict[str, float]] = {}
    for fact in statement.facts:
        if fact.relation:
            held[fact] = {"relation": float(relation_holds(fact, pair(fact, chosen)))}
        elif fact.background:
            held[fact] = {"background": float(view.background == fact.background)}
        else:
            (phrase,) = fact.phrases
            names = ["size"] if phrase.size else [name for name in CHOICES if name != "size"]
            item = chosen[places[bare(phrase)]]
            held[fact] = {name: float(getattr(item, name, None) == getattr(phrase, name)) for name in names}
    return held
