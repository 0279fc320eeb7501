"""Tokenizers of the captions' words, and fresh networks and schedulers as `bases.yaml` describes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import transformers
import yaml
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from t2i_align.testbed.captions import NUMBERS, RELATION_WORDS, plural
from t2i_align.testbed.clips import MOTIONS
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES

BASES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("bases.yaml").read_text(encoding="utf-8"))
LENGTH = 32  # tokens of CLIP; the longest caption has 23, the last four tokens are always padding
WORDS = 24  # tokens of T5
WIDTH = 128  # of the text encoder that the denoiser of `sd` or `wan` reads


def build(base: str, part: str, tokenizer: Any = None) -> Any:
    """A part of a base with fresh weights; a text encoder needs its tokenizer."""
    options = dict(BASES[base][part])
    name = options.pop("class")
    if tokenizer is not None:
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        cls = getattr(transformers, name)
        return cls(cls.config_class(vocab_size=len(tokenizer), **ids, **options))
    return getattr(diffusers, name)(**options)


def image_words() -> list[str]:
    """Every word and sign that a caption of an image can hold, sorted."""
    glue = "a an the on at to of and there is are background top bottom left right ,".split()
    relations = " ".join(RELATION_WORDS.values()).split()
    plurals = [plural(shape) for shape in SHAPES]
    return sorted({*glue, *relations, *COLOURS, *SHAPES, *plurals, *RADII, *BACKGROUNDS, *list(NUMBERS.values())[1:]})


def clip_words() -> list[str]:
    """Every word and sign that a caption of a clip can hold, sorted."""
    motions = " ".join(MOTIONS).split()
    return sorted({"a", "an", "on", "and", "background", ",", *motions, *COLOURS, *SHAPES, *RADII, *BACKGROUNDS})


def build_tokenizer() -> CLIPTokenizer:
    """A genuine CLIP BPE tokenizer: bytes, plus merges that make each word of the captions one token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in image_words():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            # Merged from the right, so that "circle" and "circles" cannot disturb each other.
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts = [*parts[:-2], "".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    learned: Any = {"vocab": vocabulary, "merges": merges}  # transformers accepts pairs, and declares strings
    return CLIPTokenizer(**learned, model_max_length=LENGTH, pad_token="<|endoftext|>")


def build_word_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """A genuine T5 (unigram) tokenizer: each of the words is a token, and so is each letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(word if word == "," else "\u2581" + word, -1.0) for word in words]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789."]
    return T5Tokenizer(vocab=cast(Any, pieces), extra_ids=0, model_max_length=WORDS)


def to_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Token ids [B, the tokenizer's length], padded."""
    ids: Tensor = tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
    return ids
