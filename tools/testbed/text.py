"""The bases' own CLIP tokenizer and text encoder, and a warm-up that teaches the encoder to read.

Stable Diffusion's text encoder arrives knowing language from CLIP's pretraining. The warm-up gives the
tiny one the same start: linear heads on the last four tokens (always padding) must tell what the caption
states. The heads are thrown away; what stays is that padding tokens hold one object each, "first" being
the left or the upper one whatever the phrasing, so that cross-attention can bind them to places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel, T5Tokenizer

from t2i_align.testbed.captions import NUMBERS, RELATION_WORDS, Statement, describe, parse, write
from t2i_align.testbed.prompts import split_of
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, Scene

C = TypeVar("C", bound=PreTrainedModel)

LENGTH = 32  # tokens; the longest caption has 23, the last four tokens are always padding
WORDS = 24  # tokens of the T5 tokenizer
WIDTH = 128
SLOTS = 3


def words() -> list[str]:
    """Every word and sign a caption can hold, sorted."""
    plurals = [shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES]
    glue = "a an the on at to of and there is are background top bottom left right ,".split()
    relations = " ".join(RELATION_WORDS.values()).split()
    return sorted({*glue, *relations, *COLOURS, *SHAPES, *plurals, *RADII, *BACKGROUNDS, *list(NUMBERS.values())[1:]})


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


def build_word_tokenizer(known: Sequence[str] = ()) -> T5Tokenizer:
    """A genuine T5 (unigram) tokenizer: each known word (by default, of captions) is a token, and so is each letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(word if word == "," else "\u2581" + word, -1.0) for word in known or words()]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789."]
    return T5Tokenizer(vocab=cast(Any, pieces), extra_ids=0, model_max_length=WORDS)


def build_text_encoder(tokenizer: CLIPTokenizer, cls: type[C], *, width: int = WIDTH, layers: int = 3) -> C:
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


class ParseHeads(nn.Module):
    """Reads the stated attributes off the last four tokens; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (len(COLOURS) + 1, len(SHAPES) + 1, len(RADII) + 1)
        self.slot = nn.Linear(WIDTH, sum(self.sizes))
        self.whole_sizes = (3, SLOTS, len(BACKGROUNDS) + 1)
        self.whole = nn.Linear(WIDTH, sum(self.whole_sizes))

    @staticmethod
    def targets(statements: list[Statement]) -> Tensor:
        """Classes [B, 12]: colour, shape, size of each slot, then axis, count - 1, background; 0 is unstated."""
        rows = []
        for statement in statements:
            if statement.relation in ("right", "below"):
                statement = statement.canonical()
            row = []
            for k in range(SLOTS):
                phrase = statement.phrases[k] if k < len(statement.phrases) else None
                for name, choices in (("colour", list(COLOURS)), ("shape", list(SHAPES)), ("size", list(RADII))):
                    value = getattr(phrase, name, None)
                    row.append(choices.index(value) + 1 if value else 0)
            axis = {None: 0, "left": 1, "above": 2}[statement.relation]
            background = list(BACKGROUNDS).index(statement.background) + 1 if statement.background else 0
            rows.append([*row, axis, statement.count - 1, background])
        return torch.tensor(rows)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over all slots; hidden [B, 32, 128], targets [B, 12]."""
        logits = self.slot(hidden[:, -4:-1].float()).split(self.sizes, dim=-1)
        terms = [F.cross_entropy(logits[j][:, k], targets[:, 3 * k + j]) for k in range(SLOTS) for j in range(3)]
        whole = self.whole(hidden[:, -1].float()).split(self.whole_sizes, dim=-1)
        terms += [F.cross_entropy(part, targets[:, 3 * SLOTS + j]) for j, part in enumerate(whole)]
        return torch.stack(terms).mean()


def warm_up(
    encoder: CLIPTextModel, heads: ParseHeads, tokenizer: CLIPTokenizer, scenes: list[Scene], *, steps: int, seed: int
) -> None:
    """Teach the encoder to read true captions of `scenes`: AdamW 2e-3 with a cosine, up to 128 captions per step.

    Statements of dev and test prompts are left out.
    """
    to_ids = WordEncoder(tokenizer)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        rng = np.random.default_rng((seed, 7, step))
        statements = [describe(scenes[i], rng) for i in rng.integers(len(scenes), size=128)]
        statements = [statement for statement in statements if split_of(statement) == "train"]
        captions = [write(statement, rng) for statement in statements]
        statements = [parse(c) if s.relation else s for c, s in zip(captions, statements, strict=True)]
        loss = heads.loss(encoder(to_ids(captions)).last_hidden_state, heads.targets(statements))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"text step {step + 1}/{steps} parse loss {loss.item():.4f}", flush=True)
