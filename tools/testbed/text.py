"""The bases' own tokenizers, and a warm-up that teaches a text encoder to read.

The text encoders of real models know language from their own pretraining. The warm-up gives the tiny ones the same
start: throw-away heads on a few tokens must tell what the caption states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel, T5Tokenizer

from t2i_align.testbed import clip_captions
from t2i_align.testbed.captions import NUMBERS, RELATION_WORDS
from t2i_align.testbed.prompts import split_of
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES
from tools.testbed.base import Base, ParseHeads
from tools.testbed.loop import LoopConfig, fit

C = TypeVar("C", bound=PreTrainedModel)

LENGTH = 32  # tokens of CLIP; the longest caption has 23, the last four tokens are always padding
WORDS = 24  # tokens of T5
WIDTH = 128


def words() -> list[str]:
    """Every word and sign that a caption of an image can hold, sorted."""
    plurals = [shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES]
    glue = "a an the on at to of and there is are background top bottom left right ,".split()
    relations = " ".join(RELATION_WORDS.values()).split()
    return sorted({*glue, *relations, *COLOURS, *SHAPES, *plurals, *RADII, *BACKGROUNDS, *list(NUMBERS.values())[1:]})


def clip_words() -> list[str]:
    """Every word and sign that a caption of a clip can hold, sorted."""
    motions = " ".join(clip_captions.MOTIONS).split()
    return sorted({"a", "an", "on", "and", "background", ",", *motions, *COLOURS, *SHAPES, *RADII, *BACKGROUNDS})


def build_tokenizer() -> CLIPTokenizer:
    """A genuine CLIP BPE tokenizer: bytes, plus merges that make each word of the captions one token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in words():
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


def build_word_tokenizer(known: Sequence[str]) -> T5Tokenizer:
    """A genuine T5 (unigram) tokenizer: each known word is a token, and so is each letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(word if word == "," else "\u2581" + word, -1.0) for word in known]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789."]
    return T5Tokenizer(vocab=cast(Any, pieces), extra_ids=0, model_max_length=WORDS)


def build_clip_text(tokenizer: CLIPTokenizer, cls: type[C], *, width: int = WIDTH, layers: int = 3) -> C:
    """A CLIP text encoder of a class with or without projection, fresh weights; Stable Diffusion's has this size."""
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class WordEncoder:
    """Captions to ids [B, 32] by table: what the tokenizer returns, fast enough for every training step."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.table = {word: tokenizer(word)["input_ids"][1:-1] for word in words()}
        split = [word for word, ids in self.table.items() if len(ids) != 1]
        if split:
            raise ValueError(f"the tokenizer splits {split} into several tokens")
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, captions: list[str]) -> Tensor:
        ids = torch.full((len(captions), LENGTH), self.end)
        ids[:, 0] = self.start
        for row, caption in zip(ids, captions, strict=True):
            for i, word in enumerate(caption.replace(",", " , ").split(), start=1):
                row[i] = self.table[word][0]
        return ids


def warm_up(base: Base, drawn: Sequence[Any], *, steps: int, seed: int, state_file: Path | None) -> nn.ModuleDict:
    """A text encoder that reads true captions of what is drawn, and its parse heads.

    Each step sees up to 128 captions; statements of dev and test prompts are left out.
    """
    world = base.world
    torch.manual_seed(seed)
    model = nn.ModuleDict({"text_encoder": base.build_text_encoder(), "heads": ParseHeads(base.parse_sizes, WIDTH)})

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, 7, step))
        statements = [world.language.describe(drawn[i], rng) for i in rng.integers(len(drawn), size=128)]
        captions = [world.language.write(statement, rng) for statement in statements if split_of(statement) == "train"]
        targets = torch.tensor([base.parse_targets(world.language.parse(caption)) for caption in captions])
        read = base.encode_text(model["text_encoder"], captions)[1]
        return {"parse": cast(ParseHeads, model["heads"]).loss(read, targets)}

    fit(model, losses, LoopConfig(steps=steps, lr=2e-3, warmup=max(1, steps // 10), every=steps), state_file)
    return model
