"""Embedders of preferences: from a few choices of a person to rows of features, from which `personal` makes tokens.

CLIP (`clip:ViT-L-14:openai`, `pickscore`, any CLIP-style scorer): each choice is a row of its own,

    sqrt(D) [ f(liked) - f(disliked),  f(prompt) ]        features f of length 1, [D]

and the personal branch learns how to pool them. A vision-language model (`vlm:owner/name`) sees a handful of choices in
one conversation, describes each and ends with a profile of the person, as in PPD (arXiv 2501.06655): the rows are the
hidden states of all its layers at the step that gives the last token of its answer, each scaled to unit variance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from t2i_align.conditioning.config import PersonalConfig
from t2i_align.conditioning.personal import Embedding
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers, first_line

if TYPE_CHECKING:
    from reward_scorers.towers import TwoTowers

BATCH = 64  # images that CLIP sees at once
MAX_NEW_TOKENS = 1024  # of a VLM's answer, as in PPD
EXAMPLE = 'Example {number}. The caption was "{prompt}". The person prefers the first of these images to the second.'
TASK = (
    "Describe for each example what the two images show, and how the preferred one differs in content, style, colours "
    "and composition beyond what its caption asks for. End with a profile of the person: what they like and dislike."
)


class Choice(NamedTuple):
    """Two images of a prompt, of which a person prefers one."""

    prompt: str
    liked: Image.Image
    disliked: Image.Image


class Embedder(ABC):
    """Choices to rows of features.

    version: identifies what decides the numbers. together: choices that make one entry. shape: of it, (rows, features).
    """

    version: str
    together: int = 1
    shape: tuple[int, int]

    @abstractmethod
    def __call__(self, choices: Sequence[Choice]) -> Tensor:
        """Entries [len(choices) / together, rows, features], float32 on the CPU, of so many choices each in turn."""

    def to(self, device: torch.device | str) -> Embedder:
        """Move the network. Returns itself."""
        return self


class ClipEmbedder(Embedder):
    """Differences of CLIP's image features, with the prompt's. Raises UserError for a scorer of another kind."""

    def __init__(self, spec: str) -> None:
        from reward_scorers.towers import TwoTowers
        from reward_scorers.weights import digest_of_tensors

        (scorer,) = build_scorers([spec])
        if not isinstance(scorer, TwoTowers):
            raise UserError(f"personal.embedder: {spec}: expected a CLIP-style scorer or vlm:MODEL")
        self.scorer: TwoTowers = scorer
        self.version = digest_of_tensors(scorer.model.state_dict())
        self.features = self._texts(["a"]).shape[1]
        self.shape = (1, 2 * self.features)

    def to(self, device: torch.device | str) -> ClipEmbedder:
        self.scorer.to(device)
        return self

    @torch.no_grad()
    def __call__(self, choices: Sequence[Choice]) -> Tensor:
        from reward_scorers.images import in_threads, to_rgb

        rows = []
        for start in range(0, len(choices), BATCH // 2):
            part = choices[start : start + BATCH // 2]
            images = [image for choice in part for image in (choice.liked, choice.disliked)]
            inputs = torch.stack(in_threads(lambda image: self.scorer.preprocess(to_rgb(image)), images))
            encoded = self.scorer.encode_images(inputs.to(self.scorer.device)).cpu()
            difference = encoded[::2] - encoded[1::2]
            rows.append(torch.cat([difference, self._texts([choice.prompt for choice in part])], dim=1))
        return math.sqrt(self.features) * torch.cat(rows).float().unsqueeze(1)

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        return self.scorer.text_features(prompts).cpu()


class VLMEmbedder(Embedder):
    """A chat model of transformers that reads several images.

    Args:
        path: folder or Hub id. together: choices in one conversation. layers: of the hidden states (None: all).
        pool: `mean` of them, or `none`.

    Raises:
        UserError: no such model, one without a chat template, or layers that it does not have.
    """

    def __init__(
        self,
        path: str,
        *,
        together: int = 4,
        layers: Sequence[int] | None = None,
        pool: str = "none",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from reward_scorers import ScorerError
        from reward_scorers.vlm import is_chat
        from reward_scorers.weights import identity, load_pretrained, loading

        try:
            load = AutoModelForImageTextToText.from_pretrained
            self.model: Any = load_pretrained(load, path, "vlm", strict=False, dtype="auto")
            with loading(f"vlm: {path!r} has no processor for images and texts"):
                self.processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        except ScorerError as error:
            raise UserError(f"personal.embedder: {error}") from error
        if not is_chat(self.processor):
            raise UserError(f"personal.embedder: vlm:{path}: expected a chat model, found one without a chat template")
        self.path, self.together, self.layers, self.pool = path, together, layers, pool
        self.max_new_tokens = max_new_tokens
        self.version = f"{identity(self.model)}, {max_new_tokens} tokens, {EXAMPLE} {TASK}"
        gray = Image.new("RGB", (64, 64), "gray")
        try:  # what does not fit shows before the long work
            probe = self._states([Choice("a gray square", gray, gray)] * together, max_new_tokens=2)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"personal.embedder: vlm:{path} cannot be asked: {first_line(error)}") from error
        self.shape = (probe.shape[0], probe.shape[1])

    def to(self, device: torch.device | str) -> VLMEmbedder:
        self.model.to(device)
        return self

    def __call__(self, choices: Sequence[Choice]) -> Tensor:
        parts = [choices[start : start + self.together] for start in range(0, len(choices), self.together)]
        return torch.stack([self._states(part, self.max_new_tokens) for part in parts])

    def _states(self, choices: Sequence[Choice], max_new_tokens: int) -> Tensor:
        """Hidden states [layers, width] at the last step of the answer, greedy as in PPD."""
        from reward_scorers.vlm import generate, without_special_tokens

        content: list[dict[str, str]] = []
        for number, choice in enumerate(choices, 1):
            prompt = without_special_tokens(self.processor.tokenizer, choice.prompt)
            content += [{"type": "text", "text": EXAMPLE.format(number=number, prompt=prompt)}]
            content += [{"type": "image"}, {"type": "image"}]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": TASK}]}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token
        images = [image.convert("RGB") for choice in choices for image in (choice.liked, choice.disliked)]
        inputs = self.processor(
            images=[images],
            text=[text],
            add_special_tokens=bos is None or not text.startswith(bos),
            return_tensors="pt",
        )
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
        answer = generate(self.model, inputs, output_hidden_states=True, **options)
        states = torch.stack([layer[0, -1] for layer in answer.hidden_states[-1]]).float().cpu()
        if self.layers is not None:
            if bad := [layer for layer in self.layers if not -len(states) <= layer < len(states)]:
                raise UserError(
                    f"personal.layers: {bad[0]}: vlm:{self.path} has {len(states)} hidden states, 0 the embeddings"
                )
            states = states[list(self.layers)]
        states = F.layer_norm(states, states.shape[-1:])
        return states.mean(0, keepdim=True) if self.pool == "mean" else states


def build_embedder(config: PersonalConfig) -> Embedder:
    """The embedder of a configuration. Raises UserError where it cannot be used."""
    if config.is_vlm:
        path = config.embedder.removeprefix("vlm:")
        return VLMEmbedder(path, together=config.most, layers=config.layers, pool=config.pool)
    return ClipEmbedder(config.embedder)


def describe(config: PersonalConfig, embedder: Embedder) -> Embedding:
    """What a personal branch for this embedder is made for."""
    rows, features = embedder.shape
    return Embedding(
        embedder=config.embedder, version=embedder.version, together=embedder.together, features=features,
        rows=rows * (config.most // embedder.together), tokens=config.tokens, width=config.width,
        layers=None if config.layers is None else tuple(config.layers), pool=config.pool,
    )  # fmt: skip


def rebuilt(embedding: Embedding) -> Embedder:
    """The embedder that a saved branch was trained with.

    Raises:
        UserError: it cannot be loaded, or is another one by now.
    """
    config = PersonalConfig(
        embedder=embedding.embedder,
        examples=embedding.together if embedding.embedder.startswith("vlm:") else 1,
        layers=None if embedding.layers is None else list(embedding.layers),
        pool=embedding.pool,  # type: ignore[arg-type]
    )
    embedder = build_embedder(config)
    if embedder.version != embedding.version:
        raise UserError(
            f"{embedding.embedder}: the personal branch was trained with the embeddings of other weights: "
            f"{embedding.version} there, {embedder.version} here"
        )
    return embedder
