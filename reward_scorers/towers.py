"""What CLIP-style scorers share: an image tower, a text tower, and the cosine of their embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision import transforms as T
from torchvision.transforms import functional as F

from reward_scorers.base import Scorer, single
from reward_scorers.images import in_threads, to_pixels, to_rgb

TEXT_CACHE = 16384  # prompts; 64 MB at 1024 float32 features
TEXT_BATCH = 256
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = T.InterpolationMode.BICUBIC


class Preprocess:
    """Steps that take an RGB image and pixels [B, 3, H, W] alike to the network's input, normalised at the end.

    Args:
        steps: transforms of torchvision or open_clip, without the normalisation.
        mean, std: of the normalisation, by channel.
        clip: cut pixels to [0, 1] before it. Bicubic interpolation overshoots at edges; 8-bit images cannot, so
            pixels must not, or sharp images score differently.
    """

    def __init__(
        self,
        *steps: Callable[[Any], Any],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        clip: bool = True,
    ) -> None:
        self.steps, self.mean, self.std, self.clip = steps, list(mean), list(std), clip

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """[3, h, w] of an image, [B, 3, h, w] of pixels."""
        for step in self.steps:
            image = step(image)
        pixels = to_pixels(image)
        return F.normalize(pixels.clamp(0, 1) if self.clip else pixels, self.mean, self.std)


def shortest_side(size: int) -> T.Resize:
    """Resize the short side to `size` pixels, as CLIP does."""
    return T.Resize(size, BICUBIC, antialias=True)


class TwoTowers(Scorer):
    """scale · cos(image, text). A subclass loads the network, its preprocessing, and may set the scale.

    Text features are kept, so each distinct prompt goes through its tower once.
    """

    differentiable = True
    scale: float = 100.0
    model: Any

    @abstractmethod
    def encode_images(self, inputs: Tensor) -> Tensor:
        """Unit features [B, D] of the network's input."""

    @abstractmethod
    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [B, D] of prompts; those that are too long are cut."""

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (self.encode_images(inputs) * self.text_features(prompts)).sum(-1)

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """`encode_images` of PIL images."""
        return self.encode_images(self._placed(torch.stack(in_threads(self.preprocess, map(to_rgb, images)))))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """`encode_texts`, each distinct prompt once; features of another precision or device are kept apart."""
        like = next(self.model.parameters())
        kind = like.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        keys = [(prompt, like.device, precision) for prompt in prompts]
        new = list(dict.fromkeys(key for key in keys if key not in self._texts))
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            self._texts.update(zip(batch, self.encode_texts([prompt for prompt, *_ in batch]), strict=True))
        features = torch.stack([self._texts[key] for key in keys])
        while len(self._texts) > TEXT_CACHE:
            self._texts.pop(next(iter(self._texts)))
        return features

    @cached_property
    def _texts(self) -> dict[tuple[str, torch.device, torch.dtype], Tensor]:
        return {}


def unit(features: Tensor) -> Tensor:
    """Features [B, D] at length one, in single precision at least: a cosine needs the digits that autocast drops."""
    return normalize(single(features), dim=-1)
