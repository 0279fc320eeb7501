"""Perturbers: captions to captions that look alike and do not fit the same image any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.labeling.language_models import TextModel, one_line, padded_in_front
from t2i_align.labeling.rules import KINDS, RulePerturber

RULES = "rules"
CAPTION = "{caption}"
TOP_P = 0.75  # DCPO (arXiv 2502.06023) samples DIPPER with it
INSTRUCTION = (
    "Change one or two details of this description of an image, such as a colour, a number, an object or a position, "
    "so that it no longer fits the image. Keep its length and style. Answer with the changed description alone.\n\n"
    "{caption}"
)


class Perturber(Protocol):
    """Changes what captions state, in batches; None where it can change nothing.

    name: what identifies it, recorded with its captions.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> list[str | None]: ...


def load_perturber(spec: str, *, kinds: Sequence[str] = KINDS, strength: int = 1, **options: Any) -> Perturber:
    """`rules` with kinds and strength of its edits, or a folder or Hub id with the options of `TextModel`.

    Raises:
        UserError: no such perturber, or one that cannot be used.
    """
    if spec == RULES:
        return RulePerturber(kinds=tuple(kinds), strength=strength)
    template = options.get("template")
    if template is not None and CAPTION not in template:
        raise UserError(f"the perturber's template has no {CAPTION} where the caption goes: {template!r}")
    return InstructedModel(spec, "perturber", **options)


class InstructedModel(TextModel):
    """A transformers model of text: a sequence-to-sequence one such as T5 or DIPPER, or a causal one such as Qwen.

    It is told `template` (default: INSTRUCTION) with the caption in place of {caption}, through its chat template if
    it has one. Answers are sampled (top-p 0.75); a batch is a function of its captions and seeds.
    """

    def _load(self, path: str, **options: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        self.is_causal = not AutoConfig.from_pretrained(path, **options).is_encoder_decoder
        kind = AutoModelForCausalLM if self.is_causal else AutoModelForSeq2SeqLM
        self.network = kind.from_pretrained(path, dtype=self.dtype, **options)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, **options)
        if self.is_causal:
            padded_in_front(self.tokenizer)

    def _try(self) -> None:
        self(["a gray square"], [0])

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        texts = [(self.template or INSTRUCTION).replace(CAPTION, caption) for caption in captions]
        inputs = self._inputs(texts)
        with torch.random.fork_rng():
            torch.manual_seed(stable_seed(*seeds))
            tokens = self._generate(inputs, do_sample=True, top_p=TOP_P, pad_token_id=self.tokenizer.pad_token_id)
        if self.is_causal:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers = [one_line(answer) for answer in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return [
            answer if answer and answer.casefold() != one_line(caption).casefold() else None
            for answer, caption in zip(answers, captions, strict=True)
        ]

    def _inputs(self, texts: list[str]) -> dict[str, Tensor]:
        chats = self.tokenizer.chat_template is not None
        if chats:
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,  # templates of models that do not think aloud take no notice
                )
                for text in texts
            ]
        inputs = self.tokenizer(texts, padding=True, add_special_tokens=not chats, return_tensors="pt")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}  # some add what models do not take
