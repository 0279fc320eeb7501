"""Prompts in segments: how they are divided, what of each is kept, and that images, runs and caches see all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import TrainablePipeline
from t2i_align import align, evaluate
from t2i_align.conditioning import segments
from t2i_align.conditioning.config import SegmentsConfig
from t2i_align.config import ModelConfig
from t2i_align.errors import UserError
from t2i_align.inference.generate import generate, sample_seed
from t2i_align.inference.models import open_model, resolve_aligned, resolve_base
from tests.reward_scorers.small import write_hf_clip
from tests.runs import image, run_values

PathOf = Callable[[str], Path]


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A cat of 3.5 kg sits. It sleeps!", ["A cat of 3.5 kg sits.", "It sleeps!"]),
        ("Fruit, e.g. a pear; Dr. Fox eats it.", ["Fruit, e.g. a pear;", "Dr. Fox eats it."]),
        ('He said "Stop!" and left. Why?', ['He said "Stop!" and left.', "Why?"]),
        ("One line\nanother\r\n\n a third ", ["One line", "another", "a third"]),
        ("一只红色的猫。背景是蓝色！好吗？", ["一只红色的猫。", "背景是蓝色！", "好吗？"]),
        ("यह एक बिल्ली है। वह सोती है।", ["यह एक बिल्ली है।", "वह सोती है।"]),
        ("masterpiece, best quality, 1girl", ["masterpiece, best quality, 1girl"]),
        ("", [""]),
        (" \n\t ", [""]),
    ],
)
def test_a_prompt_is_divided_into_sentences(prompt: str, expected: list[str]) -> None:
    assert list(segments.split(prompt, words, 75)) == expected


def test_a_long_sentence_is_divided_at_words_and_nothing_is_lost() -> None:
    sentence = " ".join(f"w{i}" for i in range(1000))
    parts = list(segments.split(sentence, words, 75))
    assert max(map(words, parts)) <= 75 and " ".join(parts) == sentence
    parts = list(segments.split("x" * 100_000, len, 75))
    assert max(map(len, parts)) <= 75 and "".join(parts) == "x" * 100_000


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipeline(request: pytest.FixtureRequest, path: PathOf) -> TrainablePipeline:
    return open_model(ModelConfig(path=str(path(request.param)), segments=SegmentsConfig(tokens=24)))


def test_one_segment_is_the_ordinary_encoding_but_for_its_end(pipeline: TrainablePipeline) -> None:
    ordinary, ours = pipeline.encode_texts(["a cat"]), pipeline.encode_prompts(["a cat"])
    length = segments.count(pipeline.pipe.tokenizer, "a cat") + 1
    assert ours["prompt_embeds"].shape[1] == 24 and ours["prompt_mask"].eq(1).all()
    assert torch.equal(ours["prompt_embeds"][:, :length], ordinary["prompt_embeds"][:, :length])
    assert (ours["prompt_embeds"][:, length:] == ours["prompt_embeds"][:, -1:]).all()  # the padding is one vector
    if "pooled_prompt_embeds" in ordinary:
        torch.testing.assert_close(ours["pooled_prompt_embeds"], ordinary["pooled_prompt_embeds"])


def test_every_segment_is_encoded_on_its_own(pipeline: TrainablePipeline) -> None:
    texts = ["a cat.", "a dog!"]
    lengths = [segments.count(pipeline.pipe.tokenizer, text) + 1 for text in texts]
    each = pipeline.encode_texts(texts)["prompt_embeds"]
    joined = pipeline.encode_prompts([" ".join(texts)])["prompt_embeds"][0, : sum(lengths)]
    torch.testing.assert_close(joined, torch.cat([row[:length] for row, length in zip(each, lengths, strict=True)]))


@pytest.mark.parametrize(("bos", "eos"), [("each", "each"), ("first", "last"), ("none", "none"), ("each", "last")])
def test_which_special_tokens_are_kept(bos: Any, eos: Any, path: PathOf) -> None:
    pipeline = open_model(ModelConfig(path=str(path("sd"))))
    options = SegmentsConfig(tokens=1, bos=bos, eos=eos)
    conditioning = segments.encode(pipeline, options, ["a cat. a dog."])
    own = sum(segments.count(pipeline.pipe.tokenizer, text) for text in ("a cat.", "a dog."))
    special = {"each": 2, "first": 1, "last": 1, "none": 0}
    assert conditioning["prompt_embeds"].shape[1] == own + special[bos] + special[eos]


def test_images_see_the_last_sentence_and_not_their_neighbours(pipeline: TrainablePipeline) -> None:
    long = " ".join(f"a cat number {i} sits." for i in range(12))
    other = long + " a red dog."
    options: dict[str, Any] = {"steps": 2, "guidance": 3.0}
    alone = [pipeline.generate([prompt], [7], **options)[0] for prompt in ("a cat", long, other)]
    together = pipeline.generate(["a cat", long, other], [7, 7, 7], **options)
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=2e-5)
    assert (alone[1] - alone[2]).abs().max() > 1e-4
    conditioning = pipeline.encode_prompts([long, other])
    torch.testing.assert_close(pipeline.generate(conditioning, [7, 7], **options), torch.stack(alone[1:]))
    cut = pipeline.encode_texts([long, other])["prompt_embeds"]
    assert torch.equal(cut[0], cut[1])  # which the ordinary encoding cannot tell apart


def test_a_run_trains_on_whole_prompts_and_its_lora_generates_with_them(sd_path: Path, tmp_path: Path) -> None:
    rows = []
    for i in range(6):
        for side in (0, 1):
            image(2 * i + side).save(tmp_path / f"{i}_{side}.png")
        prompt = "a cat. " * (1 + 9 * (i % 2)) + f"number {i}."
        rows.append({"prompt": prompt, "chosen": f"{i}_0.png", "rejected": f"{i}_1.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = []
    for number, cache in enumerate((True, False)):
        values = run_values(sd_path, tmp_path / "pairs.jsonl", tmp_path / f"run{number}", data__cache=cache)
        values["model"]["segments"] = {"tokens": 24}
        values["train"] |= {"caption_dropout": 0.5, "steps": 3}
        runs.append(align(values, progress=False))
    assert runs[0].metrics["loss"] == pytest.approx(runs[1].metrics["loss"], rel=1e-2)  # the cache is float16
    prompts = [str(rows[1]["prompt"]) + end for end in ("", " a red dog.")]
    generate(sd_path, prompts, tmp_path / "images", lora=runs[0].weights, steps=2, progress=False)
    first, second = (np.asarray(Image.open(tmp_path / "images" / f"0000{i}.png")).astype(int) for i in (0, 1))
    pipeline = open_model(ModelConfig(path=str(sd_path), segments=SegmentsConfig(tokens=24)))
    pipeline.load_lora(runs[0].weights)
    expected = pipeline.generate(prompts, [sample_seed(0, i, 0) for i in (0, 1)], steps=2)
    for image_, pixels in ((first, expected[0]), (second, expected[1])):
        assert np.abs(image_ - pixels.permute(1, 2, 0).numpy() * 255).max() < 1


def test_a_plain_model_generates_and_is_evaluated_in_segments(sd_path: Path, tmp_path: Path) -> None:
    prompts = [" ".join(f"a cat number {i} sits." for i in range(12)) + end for end in ("", " a red dog.")]
    options: dict[str, Any] = {"out": None, "steps": 2, "progress": False}
    one, other = (np.asarray(image_) for image_ in generate(sd_path, prompts, segments=24, **options))
    assert np.abs(one.astype(int) - other).max() > 0
    pipeline = open_model(ModelConfig(path=str(sd_path), segments=SegmentsConfig(tokens=24)))
    expected = pipeline.generate(prompts, [sample_seed(0, i, 0) for i in (0, 1)], steps=2)
    assert np.abs(other - expected[1].permute(1, 2, 0).numpy() * 255).max() < 1
    with pytest.raises(UserError, match="segments: only for a model that is given by its path"):
        generate(pipeline, prompts, segments=24, **options)
    with pytest.raises(UserError, match="segments must be a whole number of at least 1, found 0"):
        generate(sd_path, prompts, segments=0, **options)
    whole: dict[str, Any] = {"base": sd_path, "aligned": sd_path, "prompts": prompts, **options}
    whole |= {"scorers": f"hf-clip:{write_hf_clip(tmp_path / 'clip')}"}
    result = evaluate(**whole | {"out": tmp_path / "whole"}, segments=24)
    assert result.settings["segments"]["tokens"] == 24 and result.settings["identical_pairs"] == 2
    cut = evaluate(**whole | {"out": tmp_path / "cut"})
    (name,) = result.scorers
    assert cut.settings["segments"] is None
    assert cut.scorers[name].total.mean_before != result.scorers[name].total.mean_before


def test_a_whole_model_knows_from_its_run_how_its_prompts_were_encoded(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: somebody/base, segments: {tokens: 24, eos: last}}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    found = resolve_base(tmp_path / "model")
    assert found == ModelConfig(path=str(tmp_path / "model"), segments=SegmentsConfig(tokens=24, eos="last"))
    assert resolve_base(None, resolve_aligned(tmp_path / "model")).segments == found.segments
    assert resolve_base(tmp_path / "model", segments=48).segments == SegmentsConfig(tokens=48, eos="last")


def test_what_cannot_be_encoded_in_segments_is_refused(path: PathOf) -> None:
    with pytest.raises(UserError, match=r"model.segments: for models that read CLIP.*sd3 has a text encoder"):
        open_model(ModelConfig(path=str(path("sd3")), segments=SegmentsConfig()))
    pipeline = open_model(ModelConfig(path=str(path("sd")), segments=SegmentsConfig()))
    with pytest.raises(UserError, match=r"a prompt of [0-9]+ tokens; at most 4096 are read: 'x"):
        pipeline.encode_prompts(["x" * 100_000])
