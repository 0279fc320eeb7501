"""The one decoder of images and clips, for training, labeling and scoring; and writing clips.

Images are decoded whole or refused with a reason. Whatever comes out is upright, sRGB and 8 bits: EXIF orientation and
colour profile are applied, transparency laid on white, 16-bit gray scaled, CMYK and palettes converted. Frames of clips
(videos, animations, folders of images) follow the same rules and are decoded only as far as they are needed; videos by
the ffmpeg that comes with imageio.
"""

from __future__ import annotations

import io
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, ImageSequence
from torch import Tensor

from t2i_align.data.paths import natural
from t2i_align.data.schema import Media
from t2i_align.errors import PrintableError
from t2i_align.utils.files import atomic_file, atomic_folder

CROP = "centre"  # how `to_pixels` fits an image; part of a cache's fingerprint
# Formats that Pillow decodes by itself (EPS, for one, would run a program), and the largest image it may unpack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
MAX_PIXELS = 64 << 20
MAX_CLIP_PIXELS = 8 * MAX_PIXELS  # of a clip that is held in memory as a whole: ten seconds of 1920 x 1080
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".apng")
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
ORIENTATION, ROTATED = 0x0112, (5, 6, 7, 8)  # the EXIF entry, and its values that swap height and width
# ffmpeg also opens playlists, which name other files and addresses: only these containers, and nothing but the file.
INPUT = ["-format_whitelist", "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm", "-protocol_whitelist", "file"]
INPUT += ["-xerror", "-err_detect", "explode"]  # no damaged frame, patched up from its neighbours
INPUT += ["-max_pixels", str(MAX_PIXELS), "-threads", "1"]  # several clips are decoded at a time
# How videos are written: imageio's quality is 0 … 10, VP9's constant quality 63 … 0.
CODECS: dict[str, dict[str, Any]] = {
    ".mp4": {"quality": 8},
    ".webm": {"codec": "libvpx-vp9", "quality": None, "bitrate": 0, "output_params": ["-crf", "20", "-cpu-used", "4"]},
}
LOSSLESS: dict[str, Any] = {"codec": "libx264rgb", "pixelformat": "rgb24", "output_params": ["-qp", "0"]}
MAX_REPEAT = 1.25  # how far a wanted frame rate may exceed a clip's own before repeated frames would be its motion
TOO_SLOW = "{:.3g} frames a second, too few for {:g}"
ROUNDING = 1e-4  # seconds


class ImageError(PrintableError):
    """An image or clip that cannot be used; the message is the reason."""


class SeveralFrames(ImageError):
    """An animation or a file of several pages where an image is expected."""


class MediaSize(NamedTuple):
    """Target height and width in pixels; of clips, frame count (None: images) and rate (None: a clip's own)."""

    height: int
    width: int
    frames: int | None = None
    fps: float | None = None


class Loaded(NamedTuple):
    """pixels: float32 [3, H, W] or [F, 3, H, W] in [0, 1]. size: original (height, width) in pixels, upright."""

    pixels: Tensor
    size: tuple[int, int]


def load(media: Media, size: MediaSize) -> Loaded:
    """Decode an image or clip at the target size. Raises ImageError with the reason where it cannot be used."""
    if size.frames is None:
        image = decode(media)
        return Loaded(to_pixels(image, size.height, size.width), (image.height, image.width))
    clip = torch.empty(size.frames, 3, size.height, size.width)  # not a list first: it may have 400 MB
    original = (0, 0)
    for pixels, frame in zip(clip, frames_of(media, size.frames, size.fps), strict=True):
        pixels.copy_(to_pixels(frame, size.height, size.width))
        original = (frame.height, frame.width)
    return Loaded(clip, original)


def load_pixels(media: Media, height: int, width: int) -> Tensor:
    """An image as float32 [3, height, width] in [0, 1]."""
    return load(media, MediaSize(height, width)).pixels


def decode(media: Media) -> Image.Image:
    """Decode bytes or a file to its last pixel: an upright RGB image of 8 bits.

    Animations and multi-page files are refused: a preference between them is not one between their first frames.

    Raises:
        ImageError: empty, not an image, truncated, too large (MAX_PIXELS), animated, or of a mode without a known
            range (32-bit integers or floats).
    """
    if isinstance(media, Path) and is_clip(media):
        raise ImageError(f"{media.name} is a {'folder' if media.is_dir() else 'video'}, expected an image")
    with _decoding(media), _open(media) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG with its preview behind it
            raise SeveralFrames(f"{frames} frames or pages, expected a single image")
        return _upright(image)


def measure(media: Media) -> tuple[int, int] | None:
    """An image's upright (height, width) from its header alone; None where it has none that can be read."""
    try:
        with _decoding(media), _open(media) as image:
            width, height = image.size
            # A TIFF's size is that of the upright image already.
            rotated = image.format != "TIFF" and image.getexif().get(ORIENTATION) in ROTATED
    except ImageError:  # decoding it later gives the reason
        return None
    return ((width, height) if rotated else (height, width)) if width and height else None


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """An RGB image as float32 [3, height, width] in [0, 1].

    Scaled (antialiased, Lanczos) until it just covers the size, then cropped around its centre. An image that has
    the size already is not resampled.
    """
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return _to_uint8(image).float() / 255


def whole_clip(media: Media, fps: float | None = None) -> Tensor:
    """All frames of a clip, or so many a second, uint8 [F, 3, H, W]. Raises ImageError where it cannot be used."""
    return torch.stack([_to_uint8(frame) for frame in frames_of(media, fps=fps)])


def frames_of(media: Media, count: int | None = None, fps: float | None = None) -> Iterator[Image.Image]:
    """The first `count` frames, RGB and of one size: at `fps` those that are shown at times 0, 1/fps, 2/fps …

    count: None takes all; two at least are a clip.

    Raises:
        ImageError: no clip, damaged, too large (MAX_PIXELS), too short, frames of different sizes, no known frame rate
            where one is wanted, or one far below it.
    """
    size, frames = None, 0
    with _decoding(media):
        for frame in islice(_frames(media, fps), count):
            if size not in (None, frame.size):
                raise ImageError(f"frame {frames + 1} has {frame.size} pixels, the first has {size}")
            size, frames = frame.size, frames + 1
            if count is None and frames * frame.width * frame.height > MAX_CLIP_PIXELS:
                raise ImageError(f"its frames have more than {MAX_CLIP_PIXELS} pixels")
            yield frame
    if frames < (count or 2):
        rate = "" if fps is None else f" at {fps:g} a second"
        what = f"{frames} frames{rate}" if frames > 1 else "a single image" if frames else "no frames"
        raise ImageError(f"{what}, expected a clip of {count or 2} frames")


def save_clip(clip: Tensor, path: Path, fps: float, *, lossless: bool = False) -> None:
    """Write frames [F, 3, H, W], float in [0, 1] or uint8, to a .mp4, .webm, .gif or .webp, or as PNG to a folder.

    A file or folder is there whole or not at all. Of .mp4 and .webm, which want even sides, an odd one loses a line.
    `lossless` keeps every byte of a .mp4, which browsers then do not show.
    """
    frames = to_bytes(clip).permute(0, 2, 3, 1).cpu().numpy()
    if not path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(path) as folder:
            for number, frame in enumerate(frames):
                imageio.imwrite(folder / f"{number:05d}.png", frame)
        return
    with atomic_file(path, sync=False) as temporary:
        if path.suffix in CODECS:
            even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
            codec = LOSSLESS if lossless else CODECS[path.suffix]
            imageio.imwrite(temporary, even, plugin="FFMPEG", fps=fps, macro_block_size=2, **codec)
        else:
            imageio.imwrite(temporary, frames, plugin="pillow", duration=1000 / fps, loop=0)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as 8 bits, rounded as diffusers does; uint8 is returned as it is."""
    return pixels if pixels.dtype == torch.uint8 else (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def is_clip(path: Path) -> bool:
    """Whether a file name ends like a video's, or it is a folder, which may hold a clip's frames."""
    return path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir()


def frame_files(folder: Path) -> list[Path]:
    """The images in a folder of frames, in natural order."""
    images = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != ".")
    return sorted(filter(Path.is_file, images), key=lambda file: natural(file.name))


@contextmanager
def _decoding(media: Media) -> Iterator[None]:
    """Whatever the decoders raise becomes an ImageError."""
    try:
        if isinstance(media, bytes) and not media:
            raise ImageError("empty")
        if isinstance(media, Path) and media.exists() and not (media.is_file() or media.is_dir()):
            raise ImageError("not a regular file")  # a pipe would be waited for, a device read without end
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from error
    except FileNotFoundError as error:
        raise ImageError(f"no such file: {media!s}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"not an image in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # a damaged file can make them raise anything
        raise ImageError(f"cannot be decoded: {error}") from error


def _open(media: Media) -> Image.Image:
    """Read the header, and refuse images that are too large to unpack."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(media) if isinstance(media, bytes) else media, formats=FORMATS)
    try:
        _check_pixels(image.size)
    except ImageError:
        image.close()
        raise
    return image


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{size[0]} x {size[1]} is more than {MAX_PIXELS} pixels")


def _upright(image: Image.Image) -> Image.Image:
    """The current frame of an open file as an image of its own: RGB, turned by its EXIF orientation."""
    if image.mode in ("I", "F"):
        raise ImageError(f"mode {image.mode!r} (32 bits a pixel) has no known range; save it with 8 or 16 bits")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    image = _to_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_srgb(image: Image.Image) -> Image.Image:
    """The image in the colours of sRGB, where its profile is another; one that does not fit the image is ignored."""
    if not (content := image.info.get("icc_profile")):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode == "P" or image.has_transparency_data:
            image = image.convert(mode)
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):
        return image


def _to_uint8(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def _frames(media: Media, fps: float | None) -> Iterator[Image.Image]:
    """All frames of a clip at the wanted rate."""
    if isinstance(media, Path) and media.is_dir():
        if fps is not None:
            raise ImageError("a folder of frames has no frame rate to take others by")
        yield from map(decode, frame_files(media))
        return
    try:
        animation = _open(media)
    except Image.UnidentifiedImageError:
        with _as_file(media) as file:
            yield from _video(file, fps)
        return
    with animation:
        if not getattr(animation, "is_animated", False) or animation.format == "MPO":
            yield _upright(animation)
        elif animation.format == "TIFF":
            raise ImageError("a file of several pages, expected a clip")
        elif fps is None:
            yield from map(_upright, ImageSequence.Iterator(animation))
        else:
            yield from _at_rate(animation, fps)


def _at_rate(animation: Image.Image, fps: float) -> Iterator[Image.Image]:
    taken, end = 0, 0.0
    for own, frame in enumerate(ImageSequence.Iterator(animation), start=1):
        image, seconds = _upright(frame), animation.info.get("duration", 0) / 1000
        if seconds <= 0:
            raise ImageError("a frame without a duration: no known frame rate to take others by")
        end += seconds
        if fps * end > MAX_REPEAT * own + 1:
            raise ImageError(TOO_SLOW.format(own / end, fps))
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
        _check_pixels(meta["size"])
        if fps is not None and fps > MAX_REPEAT * meta["fps"]:
            raise ImageError(TOO_SLOW.format(meta["fps"], fps))
        for frame in stream:
            yield Image.frombytes("RGB", meta["size"], frame)


def _reason(log: str) -> str:
    """The first of ffmpeg's complaints, which follow its banner."""
    if "does not contain any stream" in log:
        return "no video in it"
    complaints = re.findall(r"^\[[^]]* @ 0x[0-9a-f]+\] (.*)", log, re.MULTILINE)
    return f"not a video that can be read ({complaints[-1].strip() if complaints else 'ffmpeg gives no reason'})"


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
