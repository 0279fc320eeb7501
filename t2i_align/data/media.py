"""Encoded images to pixels: decoded whole or refused with a reason, upright, RGB, at the size that is wanted."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from t2i_align.data.formats import VIDEO_SUFFIXES
from t2i_align.data.schema import Media

# Formats that Pillow decodes by itself (EPS, for one, would run a program), and the largest image it may unpack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64 << 20
CROP = "centre"  # how `to_pixels` fits an image; part of a cache's fingerprint


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


def decode(media: Media) -> Image.Image:
    """Bytes or a file to an RGB image, decoded to its last pixel.

    EXIF orientation is applied; CMYK and palettes are converted, 16-bit grey is scaled to 8 bits, transparency is
    laid on white. Animations and multi-page files are refused: a preference between them is not one between their
    first frames.

    Raises:
        ImageError: empty, not an image, truncated, too large (MAX_PIXELS), animated, or of a mode without a known
            range (32-bit integers or floats).
    """
    if isinstance(media, bytes) and not media:
        raise ImageError("empty")
    if isinstance(media, Path) and (media.suffix.lower() in VIDEO_SUFFIXES or media.is_dir()):
        raise ImageError(f"{media.name} is a {'folder' if media.is_dir() else 'video'}, expected an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(media) if isinstance(media, bytes) else media, formats=FORMATS) as image:
                check_pixels(image.size)
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG with its preview behind it
                    raise ImageError(f"{frames} frames or pages, expected a single image")
                return upright(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from error
    except FileNotFoundError as error:
        raise ImageError(f"no such file: {media!s}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"not an image in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        raise ImageError(f"cannot be decoded: {error}") from error


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """An RGB image as float32 [3, height, width] in [0, 1].

    Scaled (antialiased, Lanczos) until it just covers the size, then cropped around its centre. An image that has
    the size already is not resampled.
    """
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255


def load_pixels(media: Media, height: int, width: int) -> Tensor:
    """`decode`, then `to_pixels`."""
    return to_pixels(decode(media), height, width)


def time_ids(size: tuple[int, int], height: int, width: int) -> list[int]:
    """What SDXL is told of an image of `size` (height, width) that `to_pixels` has fitted (arXiv 2307.01952, 2.2).

    Its own height and width, the top and left of the crop in pixels of the scaled image, and the target's size.
    """
    scale = max(height / size[0], width / size[1])
    top, left = round((size[0] * scale - height) / 2), round((size[1] * scale - width) / 2)
    return [*size, top, left, height, width]


def check_pixels(size: tuple[int, int]) -> None:
    """Raise ImageError for an image of more than MAX_PIXELS. size: (width, height)."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than {MAX_PIXELS} pixels")


def upright(image: Image.Image) -> Image.Image:
    """What an open file shows at its current frame, as an image of its own: RGB, turned by its EXIF entry."""
    if image.mode in ("I", "F"):
        raise ImageError(f"mode {image.mode!r} (32 bits a pixel) has no known range; save it with 8 or 16 bits")
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
