"""LAION's aesthetic predictor, v2: a small head on the features of OpenAI's CLIP ViT-L/14, about 1 to 10.

https://github.com/christophschuhmann/improved-aesthetic-predictor. It sees the image alone; prompts are not used.
Images take CLIP's preprocessing, as in the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from reward_scorers.clip import DEFAULT, ClipScorer
from reward_scorers.heads import rating_layers
from reward_scorers.registry import register
from reward_scorers.towers import OnTowers, rated
from reward_scorers.weights import digest, fit, from_hub, read_state

REPOSITORY, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"  # the v2 head, as DDPO used it


@register("aesthetic")
def from_spec(argument: str) -> AestheticScorer:
    """`aesthetic`, `aesthetic:HEAD`, or `aesthetic:HEAD:MODEL:WEIGHTS` with another source of CLIP's weights."""
    head, _, clip = argument.partition(":")
    model, _, weights = (clip or DEFAULT).partition(":")
    return AestheticScorer(head, model, weights)


class AestheticScorer(OnTowers):
    """head(CLIP's unit image features).

    Args:
        head: .pth or .safetensors; "" is the Hub's, "random" is for tests.
        model, pretrained: as of `ClipScorer`; the head belongs to OpenAI's ViT-L/14.

    Raises:
        ScorerError: a head or weights that do not fit.
    """

    name = "aesthetic"

    def __init__(self, head: str, model: str, pretrained: str) -> None:
        super().__init__(ClipScorer(model, pretrained))
        size = self.towers.model.visual.image_size
        with torch.no_grad():
            blank = torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size))
            width = self.towers.encode_images(blank).shape[-1]
        self.head = rating_layers(width)
        weights = "random"
        if head != "random":
            path = Path(head) if head else from_hub(REPOSITORY, FILE, self.name)
            state = {key.removeprefix("layers."): value for key, value in read_state(path, self.name).items()}
            fit(self.head, state, f"aesthetic: {path} does not fit features of {width}")
            weights = f"sha256 {digest(path)}"
        self.head.eval().requires_grad_(False)
        self.version = f"head {weights}, {self.towers.name}, {self.towers.version}"

    def _score(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return rated(self.head, self.towers.encode_images(inputs)).squeeze(-1)
