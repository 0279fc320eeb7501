"""LAION's aesthetic predictor, v2: a small head on the features of OpenAI's CLIP ViT-L/14, about 1 to 10.

https://github.com/christophschuhmann/improved-aesthetic-predictor. It sees the image alone; prompts are not used. The
head's layers follow each other without activations, so it is one linear map, trained with dropout in between. Images
take CLIP's preprocessing, as in the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from reward_scorers.base import Judgement, Scorer
from reward_scorers.clip import DEFAULT, ClipScorer
from reward_scorers.registry import register
from reward_scorers.towers import rated
from reward_scorers.weights import digest, fit, from_hub, read_state

REPOSITORY, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"  # the v2 head, as DDPO used it
WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers among the dropouts, by which the checkpoint names them


@register("aesthetic")
def from_spec(argument: str) -> AestheticScorer:
    """`aesthetic`, `aesthetic:HEAD`, or `aesthetic:HEAD:MODEL:WEIGHTS` with another source of CLIP's weights."""
    head, _, clip = argument.partition(":")
    model, _, weights = (clip or DEFAULT).partition(":")
    return AestheticScorer(head or None, model, weights)


class AestheticScorer(Scorer):
    """head(CLIP's unit image features).

    Args:
        head: .pth or .safetensors; None is the Hub's, "random" is for tests.
        model, pretrained: as of `ClipScorer`; the head belongs to OpenAI's ViT-L/14.

    Raises:
        ScorerError: a head or weights that do not fit.
    """

    name = "aesthetic"
    differentiable = True

    def __init__(self, head: str | None, model: str, pretrained: str) -> None:
        self.clip = ClipScorer(model, pretrained)
        with torch.no_grad():
            width = self.clip.model.encode_image(torch.zeros(1, 3, *_size(self.clip))).shape[-1]
        layers = zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False)
        self.head = nn.Sequential()
        for place, wide, narrow in layers:
            self.head.add_module(str(place), nn.Linear(wide, narrow))
        told = "random"
        if head != "random":
            path = Path(head) if head else from_hub(REPOSITORY, FILE, self.name)
            state = {key.removeprefix("layers."): value for key, value in read_state(path, self.name).items()}
            fit(self.head, state, f"aesthetic: {path} does not fit features of {width}")
            told = f"sha256 {digest(path)}"
        self.head.eval().requires_grad_(False)
        self.version = f"head {told}, {self.clip.name}, {self.clip.version}"

    def to(self, device: torch.device | str) -> AestheticScorer:
        """Move the networks. Returns itself."""
        self.clip.to(device)
        self.head.to(device)
        return self

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._rated(self.clip.preprocess(pixels.float().to(self.clip.device)))

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        return self._rated(self.clip.inputs(images)), {}

    def _rated(self, inputs: Tensor) -> Tensor:
        return rated(self.head, self.clip.encode_images(inputs)).squeeze(-1)


def _size(clip: ClipScorer) -> tuple[int, int]:
    size = clip.model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)
