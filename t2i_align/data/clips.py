"""Media to clips and back: videos, animations and folders of frames, decoded only as far as they are needed.

Frames follow the rules of `images`: upright, RGB, transparency on white, scaled and cropped alike. Videos are decoded
by the ffmpeg that comes with imageio.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import imageio_ffmpeg
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from t2i_align.data.formats import frame_files
from t2i_align.data.media import FORMATS, MAX_PIXELS, ImageError, check_pixels, decode, to_pixels, upright
from t2i_align.data.schema import Media

# ffmpeg also opens playlists, which name other files and addresses: only these containers, and nothing but the file.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
INPUT = ["-format_whitelist", CONTAINERS, "-protocol_whitelist", "file", "-max_pixels", str(MAX_PIXELS)]
INPUT += ["-xerror", "-err_detect", "explode"]  # no damaged frame, patched up from its neighbours
INPUT += ["-threads", "1"]  # several clips are decoded at a time
MAX_REPEAT = 1.25  # how far a wanted frame rate may exceed a clip's own before repeated frames would be its motion
ROUNDING = 1e-4  # seconds
QUALITY = 8  # of imageio's 0 … 10


class MediaSize(NamedTuple):
    """How candidates are wanted: height and width in pixels; of clips, how many frames, and how many a second.

    frames: None for images. fps: None takes each clip's frames as they come.
    """

    height: int
    width: int
    frames: int | None = None
    fps: float | None = None


ANY_IMAGE = MediaSize(0, 0)  # where it only matters that images are wanted, and no clips


class Loaded(NamedTuple):
    """pixels: float32 [3, H, W] or [F, 3, H, W] in [0, 1]. size: (height, width) in pixels before it was scaled."""

    pixels: Tensor
    size: tuple[int, int]


def load(media: Media, extent: MediaSize) -> Loaded:
    """An image or a clip at the wanted extent. Raises ImageError with the reason where it cannot be used."""
    if extent.frames is None:
        image = decode(media)
        return Loaded(to_pixels(image, extent.height, extent.width), (image.height, image.width))
    clip = torch.empty(extent.frames, 3, extent.height, extent.width)  # not a list first: it may have 400 MB
    size = (0, 0)
    for pixels, frame in zip(clip, frames_of(media, extent.frames, extent.fps), strict=True):
        pixels.copy_(to_pixels(frame, extent.height, extent.width))
        size = (frame.height, frame.width)
    return Loaded(clip, size)


def load_clip(media: Media, frames: int, height: int, width: int, fps: float | None = None) -> Tensor:
    """The first `frames` of a clip, taken at `fps` (default: its own rate), float32 [F, 3, height, width] in [0, 1]."""
    return load(media, MediaSize(height, width, frames, fps)).pixels


def check(media: Media, extent: MediaSize) -> None:
    """Decode what `load` would, and keep nothing. Raises ImageError with the reason."""
    if extent.frames is None:
        decode(media)
    else:
        for _ in frames_of(media, extent.frames, extent.fps):
            pass


def whole(media: Media) -> Tensor:
    """All frames of a clip, 8 bits [F, 3, H, W]. Raises ImageError with the reason where it cannot be used."""
    return torch.stack([pil_to_tensor(frame) for frame in frames_of(media)])


def frames_of(media: Media, count: int | None = None, fps: float | None = None) -> Iterator[Image.Image]:
    """The first `count` frames, RGB and of one size: at `fps` those that are shown at times 0, 1/fps, 2/fps …

    count: None takes all; two at least are a clip.

    Raises:
        ImageError: no clip, damaged, too large (MAX_PIXELS), too short, frames of different sizes, no known frame rate
            where one is wanted, or one far below it.
    """
    size, found = None, 0
    try:
        for frame in islice(_frames(media, fps), count):
            if size not in (None, frame.size):
                raise ImageError(f"frame {found + 1} has {frame.size} pixels, the first has {size}")
            size, found = frame.size, found + 1
            yield frame
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"no such file: {media!s}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # a damaged file can make the decoders raise anything
        raise ImageError(f"cannot be decoded: {error}") from error
    if found < (count or 2):
        rate = "" if fps is None else f" at {fps:g} a second"
        what = f"{found} frames{rate}" if found > 1 else "a single image" if found else "no frames"
        raise ImageError(f"{what}, expected a clip of {count or 2} frames")


def save_clip(clip: Tensor, path: Path, fps: float, *, lossless: bool = False) -> None:
    """Write frames [F, 3, H, W], float in [0, 1] or uint8, to a .mp4, .gif or .webp, or as PNG files to a folder.

    A file is there whole or not at all. H.264 wants even sides: an odd one loses a line. `lossless` keeps every byte of
    a .mp4, which browsers then do not show.
    """
    frames = to_bytes(clip).permute(0, 2, 3, 1).cpu().numpy()
    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(frames):
            imageio.imwrite(path / f"{number:05d}.png", frame)
        return
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    if path.suffix == ".mp4":
        even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
        exact = {"codec": "libx264rgb", "pixelformat": "rgb24", "output_params": ["-qp", "0"]}
        how = exact if lossless else {"quality": QUALITY}
        imageio.imwrite(temporary, even, plugin="FFMPEG", fps=fps, macro_block_size=2, **how)
    else:
        imageio.imwrite(temporary, frames, plugin="pillow", duration=1000 / fps, loop=0)
    os.replace(temporary, path)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as 8 bits, rounded as diffusers does; what has 8 bits already stays as it is."""
    return pixels if pixels.dtype == torch.uint8 else (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _frames(media: Media, fps: float | None) -> Iterator[Image.Image]:
    """All frames at the wanted rate, one after the other."""
    if isinstance(media, bytes) and not media:
        raise ImageError("empty")
    if isinstance(media, Path) and media.is_dir():
        files = frame_files(media)
        if fps is not None:
            raise ImageError("a folder of frames has no frame rate to take others by")
        yield from map(decode, files)
        return
    source = io.BytesIO(media) if isinstance(media, bytes) else media
    try:
        animation = Image.open(source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        with _as_file(media) as file:
            yield from _video(file, fps)
        return
    with animation:
        yield from _animation(animation, fps)


def _animation(image: Image.Image, fps: float | None) -> Iterator[Image.Image]:
    check_pixels(image.size)
    if not getattr(image, "is_animated", False) or image.format == "MPO":  # MPO: a phone's JPEG with its preview
        yield upright(image)
    elif image.format == "TIFF":
        raise ImageError("a file of several pages, expected a clip")
    elif fps is None:
        yield from (upright(frame) for frame in ImageSequence.Iterator(image))
    else:
        yield from _at_rate(image, fps)


def _at_rate(animation: Image.Image, fps: float) -> Iterator[Image.Image]:
    taken, end = 0, 0.0
    for own, frame in enumerate(ImageSequence.Iterator(animation), start=1):
        image, seconds = upright(frame), animation.info.get("duration", 0) / 1000
        if seconds <= 0:
            raise ImageError("a frame that does not say how long it is shown: no known frame rate to take others by")
        end += seconds
        if fps * end > MAX_REPEAT * own + 1:
            raise _too_slow(own / end, fps)
        while taken / fps < end - ROUNDING:
            yield image
            taken += 1


def _video(file: Path, fps: float | None) -> Iterator[Image.Image]:
    rate = ["-fps_mode", "passthrough"] if fps is None else ["-vf", f"fps={fps}:round=up"]
    with closing(imageio_ffmpeg.read_frames(file, input_params=INPUT, output_params=rate)) as stream:
        try:
            meta = next(stream)
        except OSError as error:
            raise ImageError(_reason(str(error))) from error
        check_pixels(meta["size"])
        if fps is not None and fps > MAX_REPEAT * meta["fps"]:
            raise _too_slow(meta["fps"], fps)
        for frame in stream:
            yield Image.frombytes("RGB", meta["size"], frame)


def _too_slow(own: float, wanted: float) -> ImageError:
    return ImageError(f"{own:.3g} frames a second, too few for {wanted:g}")


def _reason(log: str) -> str:
    """The first of ffmpeg's complaints, which stand behind its banner."""
    if "does not contain any stream" in log:
        return "no video in it"
    complaints = re.findall(r"^\[[^]]* @ 0x[0-9a-f]+\] (.*)", log, re.MULTILINE)
    return f"not a video that can be read ({complaints[-1].strip() if complaints else 'ffmpeg says no more'})"


@contextmanager
def _as_file(media: Media) -> Iterator[Path]:
    """ffmpeg seeks, which it cannot do in bytes."""
    if isinstance(media, Path):
        yield media
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(media)
        file.flush()
        yield Path(file.name)
