"""What CLIP-style scorers share: an image tower, a text tower, and the cosine between what they say."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from reward_scorers.base import Judgement, Scorer

TEXT_CACHE = 16384  # prompts; 64 MB at 1024 float32 features
TEXT_BATCH = 256
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Self = TypeVar("Self", bound="TwoTowers")


class TwoTowers(Scorer):
    """scale · cos(image, text). A subclass loads the towers and says how images reach the first one.

    Text features are kept, so each distinct prompt goes through its tower once. Images are made ready in threads.
    """

    differentiable = True
    scale: float = 100.0
    model: Any  # the network

    def to(self: Self, device: torch.device | str) -> Self:
        """Move the networks. Returns itself."""
        self.model.to(device)
        self._texts.clear()
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.model.parameters()).device

    @abstractmethod
    def transform(self, image: Image.Image) -> Tensor:
        """A PIL image to the network's input [3, H, W], as the original does it."""

    @abstractmethod
    def preprocess(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] to the network's input, differentiably."""

    @abstractmethod
    def encode_images(self, inputs: Tensor) -> Tensor:
        """Unit features [B, D] of the network's input."""

    @abstractmethod
    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [B, D] of prompts; those that are too long are cut."""

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """`encode_texts`, each distinct prompt once; what autocast rounded is kept apart."""
        kind = self.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        keys = [(prompt, precision) for prompt in prompts]
        new = list(dict.fromkeys(key for key in keys if key not in self._texts))
        for start in range(0, len(new), TEXT_BATCH):
            some = new[start : start + TEXT_BATCH]
            self._texts.update(zip(some, self.encode_texts([prompt for prompt, _ in some]), strict=True))
        out = torch.stack([self._texts[key] for key in keys])
        while len(self._texts) > TEXT_CACHE:
            self._texts.pop(next(iter(self._texts)))
        return out

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images to the network's input [B, 3, H, W] on its device."""
        return torch.stack(in_threads(self.transform, images)).to(self.device)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._cosine(self.preprocess(pixels.float().to(self.device)), prompts)

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        return self._cosine(self.inputs(images), prompts), {}

    def _cosine(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (self.encode_images(inputs) * self.text_features(prompts)).sum(-1)

    @property
    def _texts(self) -> dict[tuple[str, torch.dtype | None], Tensor]:
        return self.__dict__.setdefault("_kept_texts", {})


def unit(features: Tensor) -> Tensor:
    """Features [B, D] at length one, in single precision at least: a cosine needs the digits that autocast drops."""
    return normalize(single(features), dim=-1)


def rated(head: Callable[..., Tensor], *features: Tensor, **more: Any) -> Tensor:
    """What a head makes of features, outside of autocast: rounded, ratings would be ties where there are none."""
    with torch.autocast(features[0].device.type, enabled=False):
        return head(*map(single, features), **more)


def single(values: Tensor) -> Tensor:
    """In single precision, or in double where it was that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Preprocess:
    """Resize, cut or pad to a square, normalise. The steps of transformers' CLIP processor, and of HPSv2's.

    side: of the network's input, in pixels. pad: the long side is fitted and the short one filled with black, as HPSv2
    does (an image of the right long side is left alone, as there); else the short side is fitted and the middle cut
    out, and images are resized in 8 bits, as PIL does.
    """

    side: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: int | None = None  # the short side before the cut; None: `side`
    pad: bool = False

    def image(self, image: Image.Image) -> Tensor:
        """[3, side, side] of a PIL image of any size and mode."""
        image = image.convert("RGB")
        if self.pad:
            return self._normalise(self._padded(F.to_tensor(image)))
        return self._normalise(F.to_tensor(self._cropped(image)))

    def pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, side, side] of pixels [B, 3, H, W] in [0, 1], differentiably."""
        if self.pad:
            return self._normalise(self._padded(pixels))
        # Bicubic overshoots at edges. PIL cuts that off, and so must we, or sharp images score differently.
        return self._normalise(self._cropped(pixels).clamp(0, 1))

    def _normalise(self, pixels: Tensor) -> Tensor:
        return F.normalize(pixels, list(self.mean), list(self.std))

    def _cropped(self, image: Any) -> Any:
        image = F.resize(image, [self.resize or self.side], InterpolationMode.BICUBIC, antialias=True)
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
        # Rounded down, as transformers does; torchvision's own centre crop rounds to even.
        return F.crop(image, (height - self.side) // 2, (width - self.side) // 2, self.side, self.side)

    def _padded(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self.side / max(height, width)
        if scale != 1.0:
            height, width = (max(1, round(length * scale)) for length in (height, width))
            pixels = F.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
        left, top = (self.side - width) // 2, (self.side - height) // 2
        return F.pad(pixels, [left, top, self.side - width - left, self.side - height - top])


Out = TypeVar("Out")
_POOL = ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def in_threads(function: Callable[[Image.Image], Out], images: Sequence[Image.Image]) -> list[Out]:
    """`function` of each image; Pillow's work leaves Python's lock free."""
    return [function(images[0])] if len(images) == 1 else list(_POOL.map(function, images))
