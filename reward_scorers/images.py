"""PIL images of any mode to the pixels that training data are decoded to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as F

from reward_scorers.errors import ScorerError

DECODER = "decoder 2"  # recorded with scores; changes when `to_rgb` returns other pixels for the same image
In = TypeVar("In")
Out = TypeVar("Out")
_POOL = ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, rotated as EXIF says; 16-bit grey is scaled, transparency laid on white, CMYK converted.

    Raises:
        ScorerError: animated, without pixels, damaged, or of a mode without a known range (32-bit integers, floats).
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG followed by its preview
        raise ScorerError(f"an animated image of {frames} frames; pick one frame")
    if 0 in image.size:
        raise ScorerError(f"an image of {image.width} x {image.height} pixels")
    if image.mode in ("I", "F"):  # Pillow would clip these at 255, and turn NaN to black
        raise ScorerError(f"pixels of mode {image.mode} have no known range; convert them to 8 bits")
    try:
        image.load()  # an opened file is decoded only here
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        raise ScorerError(f"cannot be decoded: {error}") from error


def to_pixels(image: Image.Image | Tensor) -> Tensor:
    """An 8-bit image as [C, H, W] in [0, 1]; pixels as they are."""
    return image if isinstance(image, Tensor) else F.to_tensor(image)


def in_threads(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """`function` of each item; Pillow and torch release the interpreter's lock."""
    listed = list(items)
    return [function(listed[0])] if len(listed) == 1 else list(_POOL.map(function, listed))
