"""Long captions: what they state, how they are read, and that their oracle sees every sentence."""

import dataclasses

import numpy as np
import pytest
import torch

from t2i_align.inference.options import build_scorers, resolve_prompts
from t2i_align.testbed import base_path
from t2i_align.testbed.captions import CaptionError, Phrase, Statement, choose_other
from t2i_align.testbed.long_captions import LongStatement, describe, facts_of, parse, sample, write
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, OPPOSITE, RADII, SHAPES, render, to_uint8
from t2i_align.testbed.world import LONG, split_of

CIRCLE, SQUARE = Phrase("circle", "red"), Phrase("square", "blue")


@pytest.fixture(scope="module")
def cases():
    rng = np.random.default_rng(3)
    scenes = [sample(rng) for _ in range(200)]
    statements = [describe(scene, rng) for scene in scenes]
    pixels = torch.from_numpy(to_uint8(np.stack([render(scene) for scene in scenes]))).movedim(-1, 1) / 255
    return scenes, statements, pixels, [write(statement, rng) for statement in statements]


def test_captions_have_6_to_12_sentences_of_which_the_last_says_something_new(cases):
    scenes, statements, _, texts = cases
    lengths = {text.count(". ") + 1 for text in texts}
    assert min(lengths) == 6 and 9 < max(lengths) <= 12
    new = [fact for s in statements for fact in s.last if fact.relation or fact.background or fact.phrases[0].size]
    assert len(new) == len(statements) and {kind(fact) for fact in new} == {"size", "relation", "background"}
    whole = [len(s.last) > 1 for s in statements]  # an object that is named nowhere else
    assert 0.05 < np.mean(whole) < 0.4
    for scene, statement, text in zip(scenes, statements, texts, strict=True):
        assert len(statement.phrases) == len(scene.objects) and all(phrase.size for phrase in statement.phrases)
        assert parse(text).canonical() == statement.canonical()
        assert facts_of(parse(text).sentences[-1]) - LongStatement(parse(text).sentences[:-1]).facts == statement.last


def kind(fact):
    return "relation" if fact.relation else "background" if fact.background else "size"


def test_captions_are_cut_off_by_the_bundled_text_encoder():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path("sd"), subfolder="tokenizer")
    lengths = [
        len(tokenizer(text, truncation=False, verbose=False).input_ids) for text in resolve_prompts("testbed:long-dev")
    ]
    assert min(lengths) > tokenizer.model_max_length == 32


def test_parse_by_hand():
    text = "A red circle. On a gray background, a blue square. Above a blue square there is a large red circle."
    large = dataclasses.replace(CIRCLE, size="large")
    statement = parse(text)
    assert statement.sentences == (
        Statement((CIRCLE,)), Statement((SQUARE,), background="gray"), Statement((large, SQUARE), "above"),
    )  # fmt: skip
    assert statement.phrases == (large, SQUARE)
    assert statement.last == {Statement((large,)), Statement((CIRCLE, SQUARE), "above")}
    assert split_of(statement) == split_of(LongStatement(statement.sentences[::-1]))


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("A photo of a cat. A red circle.", "photo of a cat"),
        (" . ", "cannot read"),
        ("Two red circles. A blue square.", "names each object"),
        ("A large red circle. A small red circle.", "contradict"),
        ("A red circle on a gray background. A red circle on a white background.", "contradict"),
        ("A red circle above a blue square. A red circle below a blue square.", "contradict"),
    ],
)
def test_what_is_no_long_caption_is_an_error(caption, message):
    with pytest.raises(CaptionError, match=message):
        parse(caption)


def test_clean_renders_hold_in_every_sentence(cases):
    _, statements, pixels, texts = cases
    verdict = LONG.oracle().judge(pixels, texts)
    assert (verdict.strict == 1).mean() >= 0.99 and verdict.quality.min() > 0.97
    assert (verdict.sentences == 1).mean() >= 0.99 and (verdict.last == 1).mean() >= 0.99
    assert np.isnan(verdict.attributes["relation"]).tolist() == [
        not any(fact.relation for fact in statement.facts) for statement in statements
    ]


def wrong(fact, taken, rng):
    """The sentence that states the opposite of a last fact, and the attribute that is then wrong."""
    if fact.relation:
        return dataclasses.replace(fact, relation=OPPOSITE[fact.relation])
    if fact.background:
        return Statement((taken[0],), background=choose_other(rng, BACKGROUNDS, fact.background))
    (phrase,) = fact.phrases
    return Statement((dataclasses.replace(phrase, size=choose_other(rng, RADII, phrase.size)),))


def test_a_wrong_last_sentence_lowers_its_attribute_and_itself_alone(cases):
    _, statements, pixels, _ = cases
    rng, seen = np.random.default_rng(4), set()
    for i, statement in enumerate(statements[:80]):
        if len(statement.last) > 1:
            continue
        (fact,) = statement.last
        bad = LongStatement((*statement.sentences[:-1], wrong(fact, statement.phrases, rng)))
        verdict = LONG.oracle().judge(pixels[i : i + 1], [write(bad, rng)])
        low = {name for name, value in verdict.attributes.items() if value[0] < 1}
        assert low == {kind(fact)} and verdict.last[0] == verdict.strict[0] == 0
        assert verdict.sentences[0] == pytest.approx(1 - 1 / len(bad.sentences))
        seen |= low
    assert seen == {"size", "relation", "background"}


def test_an_object_that_is_missing_fails_all_that_is_said_of_it(cases):
    scenes, statements, _, texts = cases
    row = next(i for i, statement in enumerate(statements) if len(statement.last) > 1)
    (new,) = {fact.phrases[0] for fact in statements[row].last if fact.phrases[0].size}
    scene = scenes[row]
    kept = tuple(item for item in scene.objects if item.shape != new.shape)
    pixels = torch.from_numpy(render(dataclasses.replace(scene, objects=kept))).movedim(-1, 0)[None]
    verdict = LONG.oracle().judge(pixels, [texts[row]])
    assert verdict.last[0] == 0 and verdict.attributes["count"][0] == 0
    assert verdict.sentences[0] == pytest.approx(1 - 1 / len(statements[row].sentences))
    assert verdict.attributes["background"][0] == 1


def test_it_is_a_scorer_and_its_prompts_are_found(cases):
    _, _, pixels, texts = cases
    (scorer,) = build_scorers("long_oracle")
    total, parts = scorer.judge(pixels[:8], texts[:8])
    assert (total > 0.97).all() and {"last", "sentences", "strict", "colour"} <= parts.keys()
    assert len(resolve_prompts("testbed:long-test")) == 320
    assert not set(resolve_prompts("testbed:long-test")) & set(resolve_prompts("testbed:long-dev"))
    assert {len(COLOURS), len(SHAPES)} == {8, 5}  # enough for three objects without a shared one
