"""The contract of a scorer: images and their prompts in, one number per image out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

Judgement = tuple[Tensor, dict[str, Tensor]]

# Interpolation and autocast leave a decoded image a little outside of [0, 1]; an image in [-1, 1] is far outside.
RANGE_TOLERANCE = 1e-3


class ScorerError(ValueError):
    """A scorer, checkpoint, image or prompt that cannot be used; says what was expected and found."""


class Scorer(ABC):
    """Scores images against prompts; a subclass fills in `_score` and, where it has them, `_parts` or `_judge`.

    Attributes:
        name: unique among scorers that are used together; recorded with every score.
        version: changes whenever the numbers do (weights, code, preprocessing); recorded with every score.
        differentiable: whether gradients of `score` reach the pixels.
        tie_margin: differences up to this size are no preference (in units of the score).
        clips: whether it takes clips as wholes, and only clips: `_score` and `_judge` get [B, F, 3, H, W].
    """

    name: str
    version: str
    differentiable: bool = False
    tie_margin: float = 0.0
    clips: ClassVar[bool] = False

    # What is called ---------------------------------------------------------------------------------------------

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] float32 of pixels [B, 3, H, W] in [0, 1]; clips [B, F, 3, H, W] get the mean over their frames.

        Raises:
            ScorerError: shapes, lengths, range or prompts that cannot be scored.
        """
        check(pixels, prompts)
        return self._score_media(pixels, prompts)

    def parts(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the score is made of, each [B] with NaN where it does not apply; {} for a scorer without parts."""
        return self.judge(pixels, prompts)[1]

    def judge(self, pixels: Tensor, prompts: Sequence[str]) -> Judgement:
        """`score` and `parts` in one pass."""
        check(pixels, prompts)
        return self._judge_media(pixels, prompts)

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B] of PIL images of any sizes and modes, through the original's exact preprocessing."""
        return self.judge_images(images, prompts)[0]

    @torch.no_grad()
    def judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        """`score_images` and the parts in one pass."""
        check_images(images, prompts)
        if self.clips:
            raise ScorerError(f"{self.name}: judges clips, not images")
        try:
            total, parts = self._judge_images(images, prompts)
        except (OSError, SyntaxError) as error:  # PIL opens a file without decoding it
            raise ScorerError(f"images: one of them cannot be decoded: {error}") from error
        return total.float(), {name: part.float() for name, part in parts.items()}

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027  (most scorers take any text)
        """Raise ScorerError for a prompt that this scorer cannot judge; asked before images are made for it."""

    def to(self, device: torch.device | str) -> Scorer:
        """Move the networks, if there are any. Returns itself."""
        return self

    def _units(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """What is judged at once, with its prompt: each frame, or each clip."""
        if self.clips and pixels.ndim != 5:
            raise ScorerError(f"{self.name}: expected clips [B, F, 3, H, W], found {list(pixels.shape)}")
        return (pixels, list(prompts)) if self.clips else _frames(pixels, prompts)

    # What a scorer fills in -------------------------------------------------------------------------------------

    @abstractmethod
    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of checked pixels [B, 3, H, W]."""

    def _judge(self, pixels: Tensor, prompts: Sequence[str]) -> Judgement:
        """Scores [B] and parts of checked pixels [B, 3, H, W]."""
        return self._score(pixels, prompts), {}

    def _score_media(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of checked pixels, images or clips: the mean over frames, unless it takes whole clips."""
        units, repeated = self._units(pixels, prompts)
        return _per_frame(self._score(units, repeated), pixels).mean(1)

    def _judge_media(self, pixels: Tensor, prompts: Sequence[str]) -> Judgement:
        """The same with parts."""
        units, repeated = self._units(pixels, prompts)
        total, parts = self._judge(units, repeated)
        # A part may apply to some frames only, hence nanmean; a NaN score has to stay one.
        named = {name: _per_frame(part, pixels).nanmean(1) for name, part in parts.items()}
        return _per_frame(total, pixels).mean(1), named

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        """Default: 8-bit RGB to [0, 1] without resizing, then the tensor path, images of one size together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            by_size.setdefault(image.size, []).append(row)
        total = torch.empty(len(images))
        parts: dict[str, Tensor] = {}
        for rows in by_size.values():
            pixels = torch.stack([F.to_tensor(images[row].convert("RGB")) for row in rows])
            some, some_parts = self._judge(pixels, [prompts[row] for row in rows])
            total[rows] = some.float().cpu()
            for name, part in some_parts.items():
                parts.setdefault(name, torch.full((len(images),), math.nan))[rows] = part.float().cpu()
        return total, parts


def rounding() -> str:
    """What autocast, where it is on, adds to the version of scores: its numbers are others."""
    kinds = (
        torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(kind)
    )
    return "".join(f", {str(dtype).removeprefix('torch.')} autocast" for dtype in kinds)


def check(pixels: Tensor, prompts: Sequence[str]) -> None:
    """Raise ScorerError unless pixels and prompts can be scored."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ScorerError(f"pixels: expected a floating-point tensor in [0, 1], found {found}")
    if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ScorerError(f"pixels: expected [B, 3, H, W] or [B, F, 3, H, W], found {list(pixels.shape)}")
    check_prompts(prompts, len(pixels))
    low, high = (float(value) for value in torch.stack(pixels.detach().aminmax()).float())
    if math.isnan(low) or math.isnan(high):  # aminmax hands a NaN on
        bad = [row for row, image in enumerate(pixels.detach().flatten(1)) if not image.isfinite().all()]
        raise ScorerError(f"pixels: rows {bad} hold NaN or infinite values")
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ScorerError(f"pixels: expected values in [0, 1], found [{low:.4g}, {high:.4g}]")


def check_images(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Raise ScorerError unless these PIL images and prompts can be scored."""
    if not hasattr(images, "__len__") or not len(images):
        found = "none" if hasattr(images, "__len__") else type(images).__name__
        raise ScorerError(f"images: expected a list of PIL images, found {found}")
    check_prompts(prompts, len(images))
    for row, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ScorerError(f"images[{row}]: expected a PIL image, found {type(image).__name__}")
        if reason := unusable(image):
            raise ScorerError(f"images[{row}]: {reason}")


def unusable(image: Image.Image) -> str | None:
    """Why a PIL image cannot be scored; None if it can."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG with its preview behind it
        return f"an animated image of {frames} frames; pick one frame"
    if 0 in image.size:
        return f"an image of {image.width} x {image.height} pixels"
    if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255, NaN to black
        return f"pixels of mode {image.mode} have no known range; convert them to 8 bits"
    return None


def check_prompts(prompts: Sequence[str], count: int) -> None:
    """Raise ScorerError unless there are `count` prompts, each a string with something in it."""
    listed = hasattr(prompts, "__len__") and not isinstance(prompts, str)
    if not listed or len(prompts) != count:
        found = f"{len(prompts)} prompts" if listed else repr(prompts)
        raise ScorerError(f"prompts: expected a list of {count}, one per image, found {found}")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ScorerError(f"prompts[{row}]: expected text, found {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # which tokenizers refuse
            raise ScorerError(f"prompts[{row}]: not valid Unicode text: {prompt!r}") from error


def _frames(pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
    if pixels.ndim == 4:
        return pixels, list(prompts)
    return pixels.flatten(0, 1), [prompt for prompt in prompts for _ in range(pixels.shape[1])]


def _per_frame(values: Tensor, pixels: Tensor) -> Tensor:
    return values.float().view(len(pixels), -1)
