"""A vision-language model as judge (VQAScore, arXiv 2404.01291): how likely its answer to a question begins with yes.

score = P(yes) in [0, 1], over the whole vocabulary at the first answered token, all spellings of the word together;
`log_odds` is log P(yes) - log P(no), which tells good images apart where P(yes) is near 1. Any image-text-to-text
model of transformers that reads a question; which one is up to you, and recorded. Images take the model's own
processor, so no gradient flows; tensors are rounded to 8 bits first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from reward_scorers.base import Judgement, Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.weights import identity, load_pretrained, loading

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'  # the paper's
SPELLINGS = {word: [space + case for space in ("", " ") for case in (word, word.title(), word.upper())]
             for word in ("yes", "no")}  # fmt: skip


def inputs_of(processor: Any, images: Sequence[Image.Image | Sequence[Image.Image]], texts: Sequence[str]) -> Any:
    """A model's inputs, padded to one batch: each image with its text, as a chat where the model has a template.

    A chat may have several images before a text.
    """
    if not is_chat(processor):
        return processor(images=list(images), text=list(texts), padding=True, return_tensors="pt")
    several = [[one] if isinstance(one, Image.Image) else list(one) for one in images]
    chats = [
        [{"role": "user", "content": [*({"type": "image"} for _ in own), {"type": "text", "text": text}]}]
        for own, text in zip(several, texts, strict=True)
    ]
    texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    return processor(
        images=several,
        text=texts,
        add_special_tokens=bos is None or not texts[0].startswith(bos),
        padding=True,
        return_tensors="pt",
    )


def is_chat(processor: Any) -> bool:
    """Whether a model has a chat template."""
    return getattr(processor, "chat_template", None) is not None


def pad_left(tokenizer: Any) -> None:
    """Let answers follow their questions without a gap."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


@torch.no_grad()
def generate(network: Any, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """`network.generate` of inputs, which are moved to its device and precision."""
    moved = {
        name: value.to(network.device, network.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    return network.generate(**moved, **options)


def without_special_tokens(tokenizer: Any, prompt: str) -> str:
    """The prompt without the model's special tokens, such as a second "<image>"."""
    for token in tokenizer.all_special_tokens:
        prompt = prompt.replace(token, " ")
    return prompt


class VLMScorer(Scorer):
    """P(yes) of an image-text-to-text model: `vlm:FOLDER` or `vlm:owner/name`.

    Args:
        path: folder or Hub id. question: with {prompt} in it. dtype: of the weights, a torch name.

    Raises:
        ScorerError: no such model, weights missing, one that reads no question, or that cannot spell yes and no.
    """

    def __init__(self, path: str, question: str = QUESTION, dtype: str = "auto") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not path:
            raise ScorerError("vlm: needs a model: vlm:owner/name, such as vlm:Qwen/Qwen2.5-VL-3B-Instruct")
        if "{prompt}" not in question:
            raise ScorerError(f"vlm: the question needs {{prompt}} in it, found {question!r}")
        self.name, self.question = f"vlm:{path}", question
        load = AutoModelForImageTextToText.from_pretrained
        # Not strict: some carry heads that only their training used.
        self.model: Any = load_pretrained(load, path, "vlm", strict=False, dtype=dtype)
        with loading(f"vlm: {path!r} has no processor for images and questions"):
            self.processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)
            self.tokenizer = self.processor.tokenizer
        pad_left(self.tokenizer)
        self.yes, self.no = self._answers()
        self.version = f"transformers {transformers.__version__}, {identity(self.model)}, {question}"
        with loading(f"vlm: {path!r} cannot be asked"):  # what does not fit shows before the long work
            self.judge([Image.new("RGB", (64, 64), "gray")], ["a gray square"])

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Judgement:
        images = [F.to_pil_image(pixels) for pixels in (255 * inputs.detach().clamp(0, 1)).round().byte().cpu()]
        if is_chat(self.processor) or len(set(prompts)) == 1:
            total, log_odds = self._asked(images, prompts)
        else:  # not all of the older models can pad: BLIP puts its first token where the padding is
            one_by_one = [self._asked([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
            total, log_odds = (torch.cat(values) for values in zip(*one_by_one, strict=True))
        return total, {"log_odds": log_odds}

    def _asked(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """P(yes) and the log odds, [B] each."""
        texts = [self.question.replace("{prompt}", without_special_tokens(self.tokenizer, text)) for text in prompts]
        # Through `generate`, so that models with and without an encoder are asked alike.
        options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        answer = generate(self.model, inputs_of(self.processor, images, texts), **options)
        log_p = answer.logits[0].float().log_softmax(-1)
        yes, no = (log_p[:, ids].logsumexp(-1) for ids in (self.yes, self.no))
        return yes.exp(), yes - no

    def _answers(self) -> tuple[list[int], list[int]]:
        """The first tokens of yes and of no, without those that both can begin with, such as a bare space."""
        first = {
            word: {
                ids[0]
                for spelling in spellings
                if (ids := self.tokenizer(spelling, add_special_tokens=False)["input_ids"])
            }
            for word, spellings in SPELLINGS.items()
        }
        yes, no = sorted(first["yes"] - first["no"]), sorted(first["no"] - first["yes"])
        if not yes or not no:
            raise ScorerError(f"{self.name}: its tokenizer has no first tokens that tell yes from no")
        return yes, no
