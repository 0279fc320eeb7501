"""Captioners: images and the prompts they were made for, to what the images show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from reward_scorers.vlm import chat_inputs, without_special_tokens
from t2i_align.errors import unknown
from t2i_align.inference.prompts import TESTBED
from t2i_align.labeling.language_models import TextModel, one_line, padded_in_front

DRAWN = "testbed:captioner"
# DCPO (arXiv 2502.06023) gives the captioner the prompt as well; it says what matters in the image.
QUESTION = (
    "Describe what this image shows in one sentence: its objects, how many there are, their attributes, where they "
    'are, and the style. It was made for the prompt "{prompt}", but may differ from it: describe what you see, in the '
    "manner of that prompt. Answer with the description alone."
)


class Captioner(Protocol):
    """Describes images, in batches; "" where it finds nothing to say.

    name: what identifies it, recorded with its captions.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]: ...


def load_captioner(spec: str, **options: Any) -> Captioner:
    """`testbed:captioner`, or a folder or Hub id with the options of `TextModel`.

    Raises:
        UserError: no such captioner, or one that cannot be used.
    """
    if not spec.startswith(TESTBED):
        return ImageModel(spec, "captioner", **options)
    if spec != DRAWN:
        raise unknown("captioner", spec, [DRAWN])
    from t2i_align.labeling.testbed import DrawnCaptioner

    return DrawnCaptioner()


class ImageModel(TextModel):
    """A transformers model for images and text, such as LLaVA, Qwen-VL, BLIP, or a vision-encoder-decoder.

    One with a chat template is asked `template` (default: QUESTION), with the image's prompt in place of {prompt}.
    Of another, `template` is the text that it continues or is controlled by; without one it captions unasked. Answers
    are the model's most likely ones.
    """

    def _load(self, path: str, **options: Any) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        self.network = AutoModelForImageTextToText.from_pretrained(path, dtype=self.dtype, **options)
        if self.network.config.model_type == "vision-encoder-decoder":  # has no processor of its own
            self.processor: Any = AutoImageProcessor.from_pretrained(path, **options)
            self.tokenizer = padded_in_front(AutoTokenizer.from_pretrained(path, **options))
        else:
            self.processor = AutoProcessor.from_pretrained(path, **options)
            self.tokenizer = padded_in_front(self.processor.tokenizer)
        self.chats = getattr(self.processor, "chat_template", None) is not None
        if self.chats and self.template is None:
            self.template = QUESTION

    def _try(self) -> None:
        self([Image.new("RGB", (64, 64), "gray")], ["a gray square"])

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        if self.template is None:
            return self._answers(images, None)
        texts = [
            self.template.replace("{prompt}", without_special_tokens(self.tokenizer, prompt)) for prompt in prompts
        ]
        if self.chats or len(set(texts)) == 1:
            return self._answers(images, texts)
        # Not all of the older models can pad: BLIP puts its first token where the padding is.
        return [self._answers([one], [text])[0] for one, text in zip(images, texts, strict=True)]

    def _answers(self, images: Sequence[Image.Image], texts: Sequence[str] | None) -> list[str]:
        inputs = self._inputs(images, texts)
        asked = inputs.get("input_ids")
        answers = self.tokenizer.batch_decode(self._generate(inputs, do_sample=False), skip_special_tokens=True)
        if asked is not None:  # most models repeat the question in front of the answer
            questions = self.tokenizer.batch_decode(asked, skip_special_tokens=True)
            answers = [a.strip().removeprefix(q.strip()) for a, q in zip(answers, questions, strict=True)]
        return [one_line(answer) for answer in answers]

    def _inputs(self, images: Sequence[Image.Image], texts: Sequence[str] | None) -> Any:
        if texts is None:
            return self.processor(images=list(images), return_tensors="pt")
        if not self.chats:
            return self.processor(images=list(images), text=list(texts), return_tensors="pt")
        return chat_inputs(self.processor, images, texts)
