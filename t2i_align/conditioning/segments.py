"""Prompts of any length for models with CLIP text encoders: encoded in segments (LongAlign, arXiv 2410.11817).

CLIP reads 77 tokens and cuts off the rest. Here a prompt is divided into sentences, each sentence is encoded on its
own, and the hidden states are joined:

    [BOS, w_1 … w_m] [BOS, w_1 … w_n] … [pad, pad …]        padded to a multiple of `tokens`

As in the authors' code every segment keeps its BOS and loses its EOS, and `pad` is one vector: the mean of the empty
prompt's last 60 hidden states. There padding is told by token ids, which deletes the prompt's own "!" where a tokenizer
pads with it (SD2.x); here by position. Whatever a batch adds beyond a prompt's own length is masked, so that an image
does not depend on its neighbours. Of SDXL's two encoders both are read, and the pooled vectors averaged. A T5 that
reads the whole prompt can be joined (`conditioning.t5`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from reward_scorers.sentences import split
from t2i_align.conditioning import t5 as t5_adapter
from t2i_align.conditioning.config import SegmentsConfig
from t2i_align.errors import UserError

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from pipelines.base import Conditioning

MASK = "prompt_mask"
SPECIAL = 2  # BOS and EOS
PADDING = 60 / 77  # share of the empty prompt's hidden states whose mean is the padding
MAX_TOKENS = 4096  # of a prompt; its attention maps would fill the memory
BATCH = 32  # segments that the encoder reads at once


def install(pipeline: TrainablePipeline, options: SegmentsConfig) -> None:
    """Encode this pipeline's prompts in segments from now on, in training and in `generate` alike.

    Raises:
        UserError: a model whose denoiser does not read CLIP's hidden states alone.
    """
    if not isinstance(pipeline.denoiser, UNet2DConditionModel):
        raise UserError(
            f"model.segments: for models that read CLIP's hidden states alone (SD1.x, SD2.x, SDXL); {pipeline.family} "
            f"has a text encoder for long prompts ({pipeline.text_tokens} tokens)"
        )
    pipeline.conditioning_masks = {"prompt_embeds": MASK}
    t5 = t5_adapter.T5(options.t5, options.tokens) if options.t5 else None
    pipeline.long_prompts = partial(encode, pipeline, options, t5=t5)
    if t5:
        pipeline.denoiser.register_forward_pre_hook(t5_adapter.narrow, with_kwargs=True)
    if options.adapter:
        t5_adapter.load(pipeline, options.adapter, base=True)


def fingerprint(pipeline: TrainablePipeline) -> str:
    """What decides how this pipeline's prompts are encoded beside its text encoders; empty without `install`."""
    way = pipeline.long_prompts
    if not isinstance(way, partial) or way.func is not encode:
        return ""
    t5 = way.keywords["t5"]
    return f"segments {way.args[1]}" + (f" T5 {t5.fingerprint()}" if t5 else "")


@torch.no_grad()
def encode(
    pipeline: TrainablePipeline, options: SegmentsConfig, prompts: Sequence[str], t5: t5_adapter.T5 | None = None
) -> Conditioning:
    """Conditioning of prompts of any length, sequences [B, L, D] with their mask [B, L].

    Raises:
        UserError: a prompt beyond MAX_TOKENS.
    """
    tokenizer = pipeline.pipe.tokenizer
    limit = int(tokenizer.model_max_length)
    segments = [list(split(prompt, partial(count, tokenizer), limit - SPECIAL)) for prompt in prompts]
    texts = list(dict.fromkeys(["", *(text for parts in segments for text in parts)]))
    rows = {text: (row, count(tokenizer, text) + SPECIAL) for row, text in enumerate(texts)}
    places = [_kept([rows[text] for text in parts], options) for parts in segments]
    for prompt, (_, positions) in zip(prompts, places, strict=True):
        if len(positions) > MAX_TOKENS:
            raise UserError(f"a prompt of {len(positions)} tokens; at most {MAX_TOKENS} are read: {prompt[:60]!r} …")
    batches = [pipeline.encode_texts(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    encoded = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    hidden = encoded.pop("prompt_embeds")
    padding = hidden[0, -round(PADDING * limit) :].mean(0)
    sequences = [
        torch.cat([hidden[segment, position], padding.expand(-len(position) % options.tokens, -1)])
        for segment, position in places
    ]
    if t5:
        sequences = t5_adapter.joined(sequences, t5.encode(prompts, hidden))
    masks = [hidden.new_ones(len(sequence)) for sequence in sequences]
    used = [[rows[text][0] for text in (parts if options.pooled == "mean" else parts[:1])] for parts in segments]
    pooled = {name: torch.stack([tensor[row].mean(0) for row in used]) for name, tensor in encoded.items()}
    return {"prompt_embeds": pad_sequence(sequences, True), MASK: pad_sequence(masks, True), **pooled}


def _kept(segments: Sequence[tuple[int, int]], options: SegmentsConfig) -> tuple[list[int], list[int]]:
    """The hidden states that make a prompt, as (segment, position) indices.

    segments: of each, its row among the encoded ones and its length with BOS, at 0, and EOS, at the end.
    """
    kept: list[tuple[int, int]] = []
    for number, (row, length) in enumerate(segments):
        bos = options.bos == "each" or (options.bos == "first" and number == 0)
        eos = options.eos == "each" or (options.eos == "last" and number == len(segments) - 1)
        kept += [(row, position) for position in range(0 if bos else 1, length - (0 if eos else 1))]
    return [row for row, _ in kept], [position for _, position in kept]


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Number of a text's tokens, without BOS and EOS."""
    return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
