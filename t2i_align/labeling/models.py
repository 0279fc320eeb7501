"""Captioners (images to what they show) and perturbers (captions to captions that no longer fit).

Both are genuine transformers models, or the testbed's captioner and the rule-based perturber.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reward_scorers.vlm import generate, inputs_of, is_chat, pad_left, without_special_tokens
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError, unknown
from t2i_align.inference.models import resolve_model
from t2i_align.inference.options import TESTBED, check_options, pick_device, use_precision
from t2i_align.labeling.rules import KINDS, RulePerturber

DRAWN = "testbed:captioner"
RULES = "rules"
PROMPT, CAPTION = "{prompt}", "{caption}"
TOP_P = 0.75  # DCPO (arXiv 2502.06023) samples DIPPER with it
# DCPO gives the captioner the prompt as well, which says what matters in the image.
QUESTION = (
    "Describe what this image shows in one sentence: its objects, how many there are, their attributes, where they "
    'are, and the style. It was made for the prompt "{prompt}", but may differ from it: describe what you see, in the '
    "manner of that prompt. Answer with the description alone."
)
INSTRUCTION = (
    "Change one or two details of this description of an image, such as a colour, a number, an object or a position, "
    "so that it no longer fits the image. Keep its length and style. Answer with the changed description alone.\n\n"
    "{caption}"
)
COMPARISON = (
    'Two clips were made for the prompt "{prompt}". The first {first} images are frames of clip 1, in order, and the '
    "other {second} are frames of clip 2. Which clip is better: fewer artefacts, more natural motion, a better fit to "
    "the prompt? Answer with 1, with 2, or with tie."
)
# A text per image or caption, "" or None where there is none. An attribute `name` is recorded with the texts.
Captioner = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str | None]]  # (images, prompts) -> descriptions
Perturber = Callable[[Sequence[str], Sequence[int]], Sequence[str | None]]  # (captions, seeds) -> other captions

Frames = Sequence[Image.Image]
Judge = Callable[[Sequence[tuple[Frames, Frames]], Sequence[str]], Sequence[str]]  # pairs of clips, prompts -> verdicts
FIRST, SECOND, TIE = "1", "2", "tie"  # verdicts


def load_captioner(spec: str, **options: Any) -> Captioner:
    """`testbed:captioner`, or a folder or Hub id with the options of `LanguageModel`.

    Raises:
        UserError: no such captioner, or one that cannot be used.
    """
    if not spec.startswith(TESTBED):
        return ImageCaptioner(spec, **options)
    if spec != DRAWN:
        raise unknown("captioner", spec, [DRAWN])
    from t2i_align.labeling.testbed import DrawnCaptioner

    return DrawnCaptioner()


def load_perturber(spec: str, *, kinds: Sequence[str] = KINDS, strength: int = 1, **options: Any) -> Perturber:
    """`rules` with kinds and strength of its edits, or a folder or Hub id with the options of `LanguageModel`.

    Raises:
        UserError: no such perturber, or one that cannot be used.
    """
    if spec == RULES:
        return RulePerturber(kinds=tuple(kinds), strength=strength)
    template = options.get("template")
    if template is not None and CAPTION not in template:
        raise UserError(f"the perturber's template has no {CAPTION} where the caption goes: {template!r}")
    return CaptionPerturber(spec, **options)


class LanguageModel(ABC):
    """A transformers model that writes texts, tried once so that what does not fit shows before the long work.

    Args:
        path: folder or Hub id.
        template: instruction for the model; None for the subclass's own.
        revision: branch, tag or commit on the Hub.
        precision: of the weights. max_new_tokens: limit of each answer.

    Raises:
        UserError: no such model, one of another kind, or one that cannot be used like this.
    """

    role: str  # for messages
    probe: tuple[Sequence[Any], Sequence[Any]]  # a subject and its context, to try the model with
    network: Any
    tokenizer: Any

    def __init__(
        self,
        path: str,
        *,
        template: str | None = None,
        revision: str | None = None,
        precision: str = "fp32",
        device: str | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        check_options(precision, max_new_tokens=max_new_tokens)
        self.device, self.dtype = pick_device(device), use_precision(precision) or torch.float32
        self.name, self.template, self.max_new_tokens = path, template, max_new_tokens
        try:
            self._load(resolve_model(path, self.role), revision=revision, trust_remote_code=False)
            pad_left(self.tokenizer)
            self.network.to(self.device).eval().requires_grad_(False)
            self(*self.probe)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers, the Hub, tokenizers and chat templates each raise their own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: cannot be used as a {self.role}: {type(error).__name__}: {reason}") from error

    @abstractmethod
    def _load(self, path: str, **options: Any) -> None:
        """Set `network`, `tokenizer` and what else is needed."""

    @abstractmethod
    def __call__(self, subjects: Sequence[Any], contexts: Sequence[Any], /) -> Sequence[str | None]:
        """A text per subject."""

    def _texts(self, tokens: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


class ImageCaptioner(LanguageModel):
    """A model for images and text, such as LLaVA, Qwen-VL, BLIP, or a vision-encoder-decoder.

    A model with a chat template is asked `template` (default: QUESTION), with the image's prompt for {prompt}. For
    others `template` is the text that they continue or are controlled by; without one they caption unconditionally.
    Answers are the model's most likely ones.
    """

    role, probe = "captioner", ([Image.new("RGB", (64, 64), "gray")], ["a gray square"])

    def _load(self, path: str, **options: Any) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        self.network = AutoModelForImageTextToText.from_pretrained(path, dtype=self.dtype, **options)
        if self.network.config.model_type == "vision-encoder-decoder":  # has no processor of its own
            self.processor: Any = AutoImageProcessor.from_pretrained(path, **options)
            self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
        else:
            self.processor = AutoProcessor.from_pretrained(path, **options)
            self.tokenizer = self.processor.tokenizer
        if is_chat(self.processor) and self.template is None:
            self.template = QUESTION

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], /) -> list[str]:
        if self.template is None:
            return self._answers(self.processor(images=list(images), return_tensors="pt"))
        texts = [self.template.replace(PROMPT, without_special_tokens(self.tokenizer, prompt)) for prompt in prompts]
        if is_chat(self.processor) or len(set(texts)) == 1:
            return self._answers(inputs_of(self.processor, images, texts))
        # Not all of the older models can pad: BLIP puts its first token where the padding is.
        each = (inputs_of(self.processor, [one], [text]) for one, text in zip(images, texts, strict=True))
        return [answer for inputs in each for answer in self._answers(inputs)]

    def _answers(self, inputs: Mapping[str, Tensor]) -> list[str]:
        tokens = generate(self.network, inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answers = self._texts(tokens)
        if "input_ids" in inputs:  # most models repeat the question in front of the answer
            questions = self._texts(inputs["input_ids"])
            answers = [a.strip().removeprefix(q.strip()) for a, q in zip(answers, questions, strict=True)]
        return [one_line(answer) for answer in answers]


class ClipJudge(LanguageModel):
    """A chat model for several images, such as Qwen-VL, that is asked which of two clips is better.

    `template` (default: COMPARISON) may have {prompt}, and {first} and {second} for the clips' numbers of frames. An
    answer with none of the verdicts in it, or with both clips, is a tie.
    """

    role, probe = "judge", ([([Image.new("RGB", (64, 64), "gray")] * 2,) * 2], ["a gray square"])

    def _load(self, path: str, **options: Any) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.network = AutoModelForImageTextToText.from_pretrained(path, dtype=self.dtype, **options)
        self.processor: Any = AutoProcessor.from_pretrained(path, **options)
        self.tokenizer = self.processor.tokenizer
        if not is_chat(self.processor):
            raise UserError(f"{path}: cannot be used as a judge: it has no chat template, with which to ask a question")
        self.template = self.template or COMPARISON

    def __call__(self, pairs: Sequence[tuple[Frames, Frames]], prompts: Sequence[str], /) -> list[str]:
        verdicts = []
        for (one, other), prompt in zip(pairs, prompts, strict=True):  # one by one: a pair is many images
            text = str(self.template).replace("{first}", str(len(one))).replace("{second}", str(len(other)))
            text = text.replace(PROMPT, without_special_tokens(self.tokenizer, prompt))
            inputs = inputs_of(self.processor, [[*one, *other]], [text])
            tokens = generate(self.network, inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            (answer,), (asked,) = self._texts(tokens), self._texts(inputs["input_ids"])
            verdicts.append(verdict(answer.strip().removeprefix(asked.strip())))
        return verdicts


def verdict(answer: str) -> str:
    """What an answer in words says: the clip whose number it has, unless it has both; else a tie."""
    numbers = {word for word in re.findall(r"\w+", answer.lower()) if word in (FIRST, SECOND)}
    return numbers.pop() if len(numbers) == 1 else TIE


class CaptionPerturber(LanguageModel):
    """A model of text: sequence-to-sequence such as T5 or DIPPER, or causal such as Qwen.

    It is given `template` (default: INSTRUCTION) with the caption for {caption}, through its chat template if it has
    one. Answers are sampled (top-p 0.75); a batch is a function of its captions and seeds.
    """

    role, probe = "perturber", (["a gray square"], [0])

    def _load(self, path: str, **options: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        self.is_causal = not AutoConfig.from_pretrained(path, **options).is_encoder_decoder
        kind = AutoModelForCausalLM if self.is_causal else AutoModelForSeq2SeqLM
        self.network = kind.from_pretrained(path, dtype=self.dtype, **options)
        self.tokenizer = AutoTokenizer.from_pretrained(path, **options)

    def __call__(self, captions: Sequence[str], seeds: Sequence[int], /) -> list[str | None]:
        texts = [(self.template or INSTRUCTION).replace(CAPTION, caption) for caption in captions]
        if chats := is_chat(self.tokenizer):
            asked = [[{"role": "user", "content": text}] for text in texts]
            # Templates of models without a thinking mode ignore `enable_thinking`.
            template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            texts = self.tokenizer.apply_chat_template(asked, **template)
        inputs = self.tokenizer(texts, padding=True, add_special_tokens=not chats, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # not all models accept others
        options = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        with torch.random.fork_rng():
            torch.manual_seed(stable_seed(*seeds))
            tokens = generate(self.network, inputs, do_sample=True, top_p=TOP_P, **options)
        if self.is_causal:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers = map(one_line, self._texts(tokens))
        unchanged = [("", one_line(caption).casefold()) for caption in captions]
        return [None if answer.casefold() in old else answer for answer, old in zip(answers, unchanged, strict=True)]


def one_line(text: str) -> str:
    """An answer as a caption: on one line, without quotation marks around it."""
    text = " ".join(text.split())
    for left, right in ('""', "''", "“”"):
        if len(text) > 1 and text[0] == left and text[-1] == right and left not in text[1:-1]:
            text = text[1:-1].strip()
    return text
