"""The video base's own T5 tokenizer and UMT5 encoder, and a warm-up that teaches the encoder to read.

Wan's text encoder arrives knowing language. The warm-up gives the tiny one the same start: throw-away heads on
the end-of-text token must tell what the caption states. That token and the words themselves are what the
denoiser attends to, since Wan sets everything after them to zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from t2i_align.testbed.clip_captions import ClipStatement, describe, write
from t2i_align.testbed.clips import PATHS, SPEEDS, Clip
from t2i_align.testbed.prompts import split_of
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES
from tools.testbed.text import WIDTH, WORDS

_CHOICES = (list(COLOURS), list(SHAPES), list(RADII), list(PATHS), list(SPEEDS))


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Three layers, 128 wide."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encode_text(encoder: UMT5EncoderModel, tokenizer: T5Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What `WanPipeline` gives its denoiser [B, 24, 128], zero after the end-of-text token, and that token [B, 128]."""
    inputs = tokenizer(captions, padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt")
    mask = inputs.attention_mask
    hidden = encoder(inputs.input_ids, mask).last_hidden_state * mask[..., None]
    return hidden, hidden[torch.arange(len(captions)), mask.sum(1) - 1]


class ParseHeads(nn.Module):
    """Reads what is stated off the end-of-text token; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        slot = [len(choices) + 1 for choices in _CHOICES]
        self.sizes = [*slot, *slot, len(BACKGROUNDS) + 1]
        self.linear = nn.Linear(WIDTH, sum(self.sizes))

    @staticmethod
    def targets(statements: list[ClipStatement]) -> Tensor:
        """Classes [B, 11]: colour, shape, size, path, speed of the mover, of what stands, and background; 0: unsaid."""
        rows = []
        for statement in statements:
            row = []
            for part in [*statement.canonical().parts, None][:2]:
                values = (
                    (part.phrase.colour, part.phrase.shape, part.phrase.size, part.path, part.speed) if part else ()
                )
                row += [
                    choices.index(v) + 1 if v else 0 for choices, v in zip(_CHOICES, values or [None] * 5, strict=True)
                ]
            rows.append([*row, list(BACKGROUNDS).index(statement.background) + 1 if statement.background else 0])
        return torch.tensor(rows)

    def loss(self, last: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over everything that may be stated; last [B, 128], targets [B, 11]."""
        logits = self.linear(last.float()).split(self.sizes, dim=-1)
        return torch.stack([F.cross_entropy(logit, targets[:, i]) for i, logit in enumerate(logits)]).mean()


def warm_up(
    encoder: UMT5EncoderModel, heads: ParseHeads, tokenizer: T5Tokenizer, clips: list[Clip], *, steps: int, seed: int
) -> None:
    """Teach the encoder to read true captions of `clips`: AdamW 2e-3 with a cosine, up to 128 captions per step.

    Statements of dev and test prompts are left out.
    """
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        rng = np.random.default_rng((seed, 7, step))
        statements = [describe(clips[i], rng) for i in rng.integers(len(clips), size=128)]
        statements = [statement for statement in statements if split_of(statement) == "train"]
        last = encode_text(encoder, tokenizer, [write(statement, rng) for statement in statements])[1]
        loss = heads.loss(last, heads.targets(statements))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"text step {step + 1}/{steps} parse loss {loss.item():.4f}", flush=True)
