"""The rule-based perturber."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_align.errors import UserError
from t2i_align.labeling import words
from t2i_align.labeling.rules import KINDS, RulePerturber
from t2i_align.testbed.captions import describe, parse, write
from t2i_align.testbed.scenes import sample_scene

ENGLISH = [
    "a red car and a white truck in front of a house",
    "An orange cat sits on a wooden table, oil painting",
    "two young girls with long hair behind a tall tree",
    "a giant robot fighting a tiny dragon above a city, 4k, trending",
    "on the left a cat, on the right a dog",
    "Three brown owls on top of a big oval stone",
    "THE CAR IS RED. A BLUE BIRD.",
    "a glass ball and a metal cube on a plastic table",
]
HUES = {*words.COLOURS}
PLACES = {part for phrase in words.RELATIONS for part in phrase.split()} | {"on", "top", "bottom"}


def drawn_caption(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return write(describe(sample_scene(rng), rng), rng)


def one(caption: str, seed: int = 0, **options) -> str | None:
    return RulePerturber(**options)([caption], [seed])[0]


phrases = st.lists(
    st.tuples(
        st.sampled_from(["a", "the", "two", "one", "his"]),
        st.sampled_from(["", "small", "orange", "blue", "wooden", "grey", "oval"]),
        st.sampled_from(["circle", "old cat", "dogs", "table", "orange", "umbrella", "square"]),
        st.sampled_from([" and ", ", ", " to the left of ", " behind ", ". ", " "]),
    ),
    min_size=1,
    max_size=5,
)


@given(parts=phrases, seed=st.integers(0, 2**63 - 1), strength=st.integers(1, 4))
def test_perturbation_is_deterministic_and_keeps_articles_correct(parts, seed, strength) -> None:
    caption = "".join(
        " ".join(filter(None, [words.article(size or noun) if det == "a" else det, size, noun])) + end
        for det, size, noun, end in parts
    )
    changed = one(caption, seed, strength=strength)
    assert changed == one(caption, seed, strength=strength)
    assert changed is None or changed.casefold() != caption.casefold()
    for article, word in re.findall(r"\b([Aa]n?) (\w+)", changed or ""):
        assert article.lower() == words.article(word), changed


@given(text=st.text(max_size=60), seed=st.integers(0, 10))
def test_any_text_is_accepted(text: str, seed: int) -> None:
    assert one(text, seed, strength=3) != text


@given(seed=st.integers(0, 10**6), choice=st.integers(0, 10))
@settings(deadline=None)
def test_each_kind_changes_only_its_own_attributes(seed: int, choice: int) -> None:
    """The statement that is read back differs in the kind's own attributes and in nothing else."""
    caption = drawn_caption(seed)
    truth = parse(caption)
    for kind in KINDS:
        changed = one(caption, choice, kinds=[kind])
        if changed is None:
            possible = {
                "attribute": True,
                "count": False,  # only some phrasings: "there is" needs a singular
                "relation": truth.relation is not None,
                "exchange": False,
            }
            assert not possible[kind], caption
            continue
        statement = parse(changed)
        assert statement.canonical() != truth.canonical(), (caption, changed)
        same = [(p, q) for p, q in zip(truth.phrases, statement.phrases, strict=True) if p == q]
        numbers = [p.number for p in truth.phrases], [p.number for p in statement.phrases]
        assert (numbers[0] != numbers[1]) == (kind == "count")
        assert (truth.relation != statement.relation) == (kind == "relation")
        if kind in ("relation", "exchange", "count"):
            assert truth.background == statement.background
        if kind == "attribute":
            assert len(same) + (truth.background == statement.background) == len(truth.phrases)
        if kind == "exchange":
            for values in ("colour", "size"):
                assert sorted(str(getattr(p, values)) for p in truth.phrases) == sorted(
                    str(getattr(p, values)) for p in statement.phrases
                )
            assert [p.shape for p in truth.phrases] == [p.shape for p in statement.phrases]


def test_a_drawn_pair_allows_every_kind() -> None:
    caption = "a large red circle to the left of a small blue square on a white background"
    assert one(caption, 0, kinds=["count"]) in [
        f"{a} to the left of {b} on a white background"
        for a, b in [
            ("two large red circles", "a small blue square"),
            ("three large red circles", "a small blue square"),
            ("a large red circle", "two small blue squares"),
            ("a large red circle", "three small blue squares"),
        ]
    ]
    assert one(caption, 0, kinds=["relation"]) == caption.replace("left", "right")
    exchanged = {one(caption, seed, kinds=["exchange"]) for seed in range(20)}
    assert exchanged == {
        "a large blue circle to the left of a small red square on a white background",
        "a small red circle to the left of a large blue square on a white background",
    }
    assert len({one(caption, seed, kinds=["attribute"]) for seed in range(200)}) == 2 + 2 * 6 + 2 * 3 + 2


@pytest.mark.parametrize("caption", ENGLISH)
@pytest.mark.parametrize("kind", KINDS)
def test_only_words_of_the_selected_kind_change(caption: str, kind: str) -> None:
    allowed = {
        "attribute": {*words.ADJECTIVES, *words.SHAPES, "short"},
        "count": {*words.NUMBERS, *words.PLURALS, *words.NOUNS},
        "relation": {*PLACES, "underneath", "in", "front", "of", "behind", "below"},
        "exchange": {*words.ADJECTIVES},
    }[kind] | {"a", "an"}
    for seed in range(10):
        changed = one(caption, seed, kinds=[kind])
        if changed is None:
            continue
        before, after = (re.findall(r"\w+", text.lower()) for text in (caption, changed))
        assert set(before) ^ set(after) <= allowed, changed
        if kind in ("attribute", "exchange"):
            assert len(before) == len(after)
        if kind == "exchange":
            assert sorted({*before} - {"a", "an"}) == sorted({*after} - {"a", "an"})


@pytest.mark.parametrize(
    ("caption", "kinds", "expected"),
    [
        ("on the left a cat, on the right a dog", ["relation"], "on the right a cat, on the left a dog"),
        ("An OLIVE CAR above A House", ["relation"], "An OLIVE CAR below A House"),
        ("a red car and a white truck", ["exchange"], "a white car and a red truck"),
        ("a scarlet bus and an olive bicycle", ["exchange"], "an olive bus and a scarlet bicycle"),
        ("Two men in a boat race", ["count"], "Three men in a boat race"),
        ("TWO CATS", ["count"], "THREE CATS"),
        ("the tall man", ["attribute"], "the short man"),
        ("a little elephant", ["attribute"], "a big elephant"),
        ("a dog", ["attribute"], None),
        ("a dog sits here", ["count"], None),  # "two dogs sits here"
        ("there is a dog", ["count"], None),
        ("a man with his dog", ["count"], None),
        ("a dog house", ["attribute", "exchange", "relation"], None),
        ("an orange on the shelf", ["attribute", "exchange"], None),  # the fruit
        ("a glass of water", ["attribute"], None),
        ("a portrait, 16:9, 2.5 k", list(KINDS), None),
        ("a red and white shirt", ["exchange"], None),  # the same shirt
        ("a red cat and a blue cat", ["exchange"], None),  # the same cats
        ("a teal ball and a turquoise car", ["exchange"], None),
        ("a red circle on a white background", ["exchange"], None),
        ("", list(KINDS), None),
        ("ein roter Kreis", list(KINDS), None),
    ],
)
def test_english(caption: str, kinds: list[str], expected: str | None) -> None:
    assert one(caption, 3, kinds=kinds) == expected


def test_strength_is_the_number_of_edits() -> None:
    caption = "a red cat, a blue dog, a green bird, a pink horse"
    for strength in (1, 2, 3):
        changed = one(caption, 1, kinds=["attribute"], strength=strength)
        assert changed is not None
        assert sum(a != b for a, b in zip(caption.split(), changed.split(), strict=True)) == strength
    assert one("a red dog", 1, kinds=["attribute"], strength=9) is not None


def test_every_replacement_is_in_its_own_table() -> None:
    """What is offered can be recognised and changed again, so the article rule holds for it as well."""
    for table in (words.COLOURS, words.MATERIALS, words.FORMS, words.SHAPES, words.NUMBERS):
        for word, others in table.items():
            assert others and word not in others
            assert {*others} <= {*table}
    for word, other in {**words.RELATIONS, **{k: v for axis in words.AXES for k, v in axis.items()}}.items():
        assert word != other


def test_bad_rules_are_refused() -> None:
    with pytest.raises(UserError, match="unknown kind of edit 'colour'"):
        RulePerturber(kinds=["colour"])
    with pytest.raises(UserError, match="strength must be"):
        RulePerturber(strength=0)
    with pytest.raises(UserError, match="none given"):
        RulePerturber(kinds=[])
