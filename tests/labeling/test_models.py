"""Captioners and perturbers: the testbed's, and tiny random ones of genuine classes."""

from __future__ import annotations

import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
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

from t2i_align.errors import UserError
from t2i_align.labeling.models import QUESTION, ImageCaptioner, load_captioner, load_perturber, one_line
from t2i_align.testbed.captions import parse
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import render, sample_scene, to_uint8
from tests.runs import image
from tests.tiny import byte_tokenizer


def test_drawn_captioner_describes_the_scene() -> None:
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


def test_empty_image_has_no_caption_and_other_names_are_refused() -> None:
    assert load_captioner("testbed:captioner")([Image.new("L", (64, 64))], [""]) == [""]
    with pytest.raises(UserError, match="testbed:captioner"):
        load_captioner("testbed:blip")


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
def test_batched_captions_equal_single_ones(name: str, captioners: dict[str, Path]) -> None:
    captioner = load_captioner(str(captioners[name]), max_new_tokens=6)
    images = [image(0, 40), image(1, 32), image(2, 64).resize((50, 20))]
    captions = captioner(images, PROMPTS)
    assert len(captions) == 3 and any(captions)
    assert all(caption == " ".join(caption.split()) for caption in captions)
    assert captions == [captioner([p], [q])[0] for p, q in zip(images, PROMPTS, strict=True)]
    assert captioner.name == str(captioners[name])


def test_chat_model_is_asked_the_question_which_the_answer_lacks(captioners: dict[str, Path]) -> None:
    captioner = load_captioner(str(captioners["llava"]), max_new_tokens=6)
    assert isinstance(captioner, ImageCaptioner) and captioner.template == QUESTION
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


def test_template_prompts_a_captioner_without_chat(captioners: dict[str, Path]) -> None:
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
def test_model_perturber_depends_only_on_its_seeds(make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    perturber = load_perturber(str(make(tmp_path / "model")), max_new_tokens=8)
    captions = ["a red fox", "an owl on a branch"]
    state = torch.get_rng_state()
    first = perturber(captions, [1, 2])
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 2 and all(text is None or text not in captions for text in first)
    assert any(first) and not any("assistant" in re.sub(r"</w>|\W", "", text or "") for text in first)
    assert perturber(captions, [1, 2]) == first != perturber(captions, [3, 4])


def test_unusable_models_are_named(tmp_path: Path, captioners: dict[str, Path]) -> None:
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


def test_answers_become_one_line() -> None:
    assert one_line(' "a red\n fox" ') == "a red fox"
    assert one_line('"a" and "b"') == '"a" and "b"'
    assert one_line("'tis a fox'") == "tis a fox"
    assert one_line('"') == '"' and one_line("") == ""
