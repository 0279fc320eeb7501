"""Captioners, perturbers and votes: what they say, and that models go through the genuine path."""

from __future__ import annotations

import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from t2i_align.data.votes import RULES, majority, mean_rank, total
from t2i_align.errors import UserError
from t2i_align.labeling import words
from t2i_align.labeling.captioner import QUESTION, ImageModel, load_captioner
from t2i_align.labeling.language_models import one_line
from t2i_align.labeling.perturber import load_perturber
from t2i_align.labeling.rules import KINDS, RulePerturber
from t2i_align.testbed.captions import describe, parse, write
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import render, sample_scene, to_uint8
from tests.runs import image
from tests.tiny import byte_tokenizer

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


# Rules ----------------------------------------------------------------------------------------------------------


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
def test_a_perturbed_caption_differs_is_determined_and_says_a_and_an_as_before(parts, seed, strength) -> None:
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
def test_any_text_is_taken(text: str, seed: int) -> None:
    assert one(text, seed, strength=3) != text


@given(seed=st.integers(0, 10**6), choice=st.integers(0, 10))
@settings(deadline=None)
def test_each_kind_falsifies_its_own_part_of_a_drawn_caption(seed: int, choice: int) -> None:
    """The statement that is read back differs in the kind's own attributes and in nothing else."""
    caption = drawn_caption(seed)
    truth = parse(caption)
    for kind in KINDS:
        changed = one(caption, choice, kinds=[kind])
        if changed is None:
            possible = {
                "attribute": True,
                "count": False,  # of some phrasings only: "there is" agrees with one
                "relation": truth.relation is not None,
                "exchange": False,
            }
            assert not possible[kind], caption
            continue
        found = parse(changed)
        assert found.canonical() != truth.canonical(), (caption, changed)
        same = [(p, q) for p, q in zip(truth.phrases, found.phrases, strict=True) if p == q]
        numbers = [p.number for p in truth.phrases], [p.number for p in found.phrases]
        assert (numbers[0] != numbers[1]) == (kind == "count")
        assert (truth.relation != found.relation) == (kind == "relation")
        if kind in ("relation", "exchange", "count"):
            assert truth.background == found.background
        if kind == "attribute":
            assert len(same) + (truth.background == found.background) == len(truth.phrases)
        if kind == "exchange":
            for values in ("colour", "size"):
                assert sorted(str(getattr(p, values)) for p in truth.phrases) == sorted(
                    str(getattr(p, values)) for p in found.phrases
                )
            assert [p.shape for p in truth.phrases] == [p.shape for p in found.phrases]


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


def test_every_offered_word_is_known_to_its_own_table() -> None:
    """What is offered can be recognised and changed again, so the article rule holds for it as well."""
    for table in (words.COLOURS, words.MATERIALS, words.FORMS, words.SHAPES, words.NUMBERS):
        for word, others in table.items():
            assert others and word not in others
            assert {*others} <= {*table}
    for word, other in {**words.RELATIONS, **{k: v for axis in words.AXES for k, v in axis.items()}}.items():
        assert word != other


def test_bad_rules_are_named() -> None:
    with pytest.raises(UserError, match="unknown kind of edit 'colour'"):
        RulePerturber(kinds=["colour"])
    with pytest.raises(UserError, match="strength must be"):
        RulePerturber(strength=0)
    with pytest.raises(UserError, match="none given"):
        RulePerturber(kinds=[])


# The testbed's captioner ----------------------------------------------------------------------------------------


def test_the_testbeds_captioner_says_what_the_image_shows() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(60)]
    images = [Image.fromarray(to_uint8(render(scene))) for scene in scenes]
    captioner = load_captioner("testbed:captioner")
    captions = captioner(images, ["a green cross"] * 60)
    assert captions == captioner(images, ["something else"] * 60)
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in images])
    assert (Oracle().judge(pixels, captions).strict == 1).mean() >= 0.98
    for scene, caption in zip(scenes, captions, strict=True):
        statement = parse(caption)
        assert statement.background == scene.background and statement.count == len(scene.objects)
    larger = [p.resize((256, 256), Image.Resampling.BICUBIC) for p in images]
    again = [
        parse(a).canonical() == parse(b).canonical()
        for a, b in zip(captions, captioner(larger, [""] * 60), strict=True)
    ]
    assert np.mean(again) >= 0.95


def test_an_empty_image_has_no_caption_and_other_names_are_refused() -> None:
    assert load_captioner("testbed:captioner")([Image.new("L", (64, 64))], [""]) == [""]
    with pytest.raises(UserError, match="testbed:captioner"):
        load_captioner("testbed:blip")


# Genuine models, tiny and random --------------------------------------------------------------------------------


def bert_tokenizer() -> BertTokenizerFast:
    letters = [*string.ascii_lowercase, *string.digits, *".,:'\"-"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *(f"##{c}" for c in letters)]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})


def plain_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    return tokenizer


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
)


def blip(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**SMALL, **special, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "projection_dim": 16}
    BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={**VISION, "initializer_range": 0.5}, projection_dim=16)
    ).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path) -> Path:
    tokenizer = plain_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, **ends)
    model = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION, initializer_range=0.5), text)
    )
    model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    tokenizer = plain_tokenizer(("<image>",))
    text = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("captioners")
    return {make.__name__: make(folder / make.__name__) for make in (blip, encoder_decoder, llava)}


PROMPTS = ["a red fox", "an owl with glasses on a <image> branch", "x"]


@pytest.mark.parametrize("name", ["blip", "encoder_decoder", "llava"])
def test_a_captioner_of_transformers_runs_and_a_batch_changes_nothing(name: str, captioners: dict[str, Path]) -> None:
    captioner = load_captioner(str(captioners[name]), max_new_tokens=6)
    images = [image(0, 40), image(1, 32), image(2, 64).resize((50, 20))]
    captions = captioner(images, PROMPTS)
    assert len(captions) == 3 and any(captions)
    assert all(caption == " ".join(caption.split()) for caption in captions)
    assert captions == [captioner([p], [q])[0] for p, q in zip(images, PROMPTS, strict=True)]
    assert captioner.name == str(captioners[name])


def test_a_chat_is_asked_the_question_and_answers_without_it(captioners: dict[str, Path]) -> None:
    captioner = load_captioner(str(captioners["llava"]), max_new_tokens=6)
    assert isinstance(captioner, ImageModel) and captioner.template == QUESTION
    seen = []
    generate = captioner.network.generate

    def recorded(**inputs):
        seen.append(inputs)
        return generate(**inputs)

    captioner.network.generate = recorded
    answers = captioner([image(0), image(1)], ["a red fox", "a <image>"])
    (question, _), answers = (
        [re.sub(r"</w>|\W", "", text) for text in texts]  # the tiny tokenizer marks the ends of words
        for texts in (captioner.tokenizer.batch_decode(seen[0]["input_ids"], skip_special_tokens=True), answers)
    )
    assert "madeforthepromptaredfox" in question and question.endswith("assistant")
    assert all(answers) and not any("assistant" in answer for answer in answers)
    assert (seen[0]["input_ids"] == captioner.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [16, 16]
    assert seen[0]["attention_mask"][:, -1].all()  # padded on the left


def test_a_template_leads_a_captioner_without_chat(captioners: dict[str, Path]) -> None:
    captioner = load_captioner(str(captioners["blip"]), template="a photo of {prompt}", max_new_tokens=4)
    answers = captioner([image(0), image(1)], ["cat", "elephant"])
    assert answers == [captioner([image(0)], ["cat"])[0], captioner([image(1)], ["elephant"])[0]]
    assert not any("photo" in answer for answer in answers)


def t5(folder: Path) -> Path:
    tokenizer = plain_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = CHAT
    LlamaForCausalLM(
        LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [t5, llama])
def test_a_perturber_of_transformers_runs_and_depends_on_its_seeds(make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    perturber = load_perturber(str(make(tmp_path / "model")), max_new_tokens=8)
    captions = ["a red fox", "an owl on a branch"]
    state = torch.get_rng_state()
    first = perturber(captions, [1, 2])
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 2 and all(text is None or text not in captions for text in first)
    assert any(first) and not any("assistant" in re.sub(r"</w>|\W", "", text or "") for text in first)
    assert perturber(captions, [1, 2]) == first != perturber(captions, [3, 4])


def test_what_is_no_model_is_named(tmp_path: Path, captioners: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such captioner"):
        load_captioner("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: cannot be used as a captioner"):
        load_captioner(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="cannot be used as a perturber"):
        load_perturber(str(captioners["blip"]))
    with pytest.raises(UserError, match="where the caption goes"):
        load_perturber(str(captioners["blip"]), template="change it")
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        load_captioner(str(captioners["blip"]), precision="fp8")


def test_one_line() -> None:
    assert one_line(' "a red\n fox" ') == "a red fox"
    assert one_line('"a" and "b"') == '"a" and "b"'
    assert one_line("'tis a fox'") == "tis a fox"
    assert one_line('"') == '"' and one_line("") == ""


# Votes ----------------------------------------------------------------------------------------------------------


def test_majority_of_a_pair_is_the_share_of_votes() -> None:
    """Two of three prefer the second: 1/3 and 2/3. One that cannot tell gives half to each: (1 + 1/2) / 2."""
    np.testing.assert_allclose(majority(np.array([[1, 2], [5, 3], [0, 9]])), [1 / 3, 2 / 3])
    np.testing.assert_allclose(majority(np.array([[2, 1], [4, 4]])), [0.75, 0.25])
    np.testing.assert_allclose(majority(np.array([[2, 1], [1, 2]])), [0.5, 0.5])


def test_majority_of_several_is_the_mean_of_pairwise_wins() -> None:
    """k = 3, n = 2. Scorer one: a > b > c, wins 2, 1, 0. Scorer two: b > a = c, wins 1/2, 2, 1/2. Over n(k - 1) = 4."""
    scores = np.array([[3, 2, 1], [10, 90, 10]])
    np.testing.assert_allclose(majority(scores), [2.5 / 4, 3 / 4, 0.5 / 4])
    np.testing.assert_allclose(mean_rank(scores), [-1.75, -1.5, -2.75])  # (1 + 2.5) / 2, (2 + 1) / 2, (3 + 2.5) / 2
    np.testing.assert_allclose(total(scores), [13, 92, 11])


def test_margins_make_small_differences_ties() -> None:
    """The first scorer's 0.01 is no preference, so its vote is halved: (1/2 + 1) / 2 and (1/2 + 0) / 2."""
    scores = np.array([[0.50, 0.51], [7.0, 3.0]])
    np.testing.assert_allclose(majority(scores), [0.5, 0.5])
    np.testing.assert_allclose(majority(scores, [0.02, 0.0]), [0.75, 0.25])


@given(
    scores=st.integers(1, 4).flatmap(
        lambda n: st.integers(1, 5).flatmap(
            lambda k: st.lists(st.lists(st.integers(-3, 3), min_size=k, max_size=k), min_size=n, max_size=n)
        )
    )
)
def test_majority_orders_as_mean_ranks_do_and_shares_out_half(scores: list[list[int]]) -> None:
    phi = majority(np.array(scores))
    assert (phi >= 0).all() and (phi <= 1).all()
    np.testing.assert_allclose(phi.mean(), 0.5)
    if len(phi) > 1:
        np.testing.assert_allclose(phi, (len(phi) + mean_rank(np.array(scores))) / (len(phi) - 1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scores", [[1.0, 2.0], [[]], [[1.0, float("nan")]]])
def test_votes_need_finite_numbers(rule: str, scores: list) -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        RULES[rule](np.array(scores), None)
