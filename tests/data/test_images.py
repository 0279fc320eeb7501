"""Images: decoded whole or refused with a reason; upright, RGB, the size that is wanted."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from t2i_align.data import media
from t2i_align.data.media import ImageError, decode, measure, to_pixels
from tests.data.test_examples import noise_jpeg


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_upright(format: str, orientation: int) -> None:
    """A white corner at the top left is shown at the EXIF orientation's; the header tells the size that comes out."""
    stored = Image.new("RGB", (64, 32))
    stored.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, format, exif=exif)
    upright = decode(content)
    assert upright.size == ((64, 32) if orientation < 5 else (32, 64)) and measure(content) == upright.size[::-1]
    left, right, top, bottom = 2, upright.width - 3, 2, upright.height - 3
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)] * 2
    expected = corners[orientation - 1 if orientation < 5 else orientation - 5]
    assert {corner for corner in corners if upright.getpixel(corner)[0] > 128} == {expected}


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("RGB", "TIFF"), ("RGB", "AVIF"), ("RGBA", "PNG"), ("P", "PNG")],
)
def test_colours_are_those_of_srgb(mode: str, format: str) -> None:
    """A profile whose red is sRGB's blue, and the other way round. A broken one and sRGB's own change nothing."""
    stored = Image.new("RGB", (16, 16), (200, 60, 90))
    stored = stored.quantize() if mode == "P" else stored.convert(mode)
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format in ("JPEG", "AVIF") else {}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"xXYZ").replace(b"bXYZ", b"rXYZ").replace(b"xXYZ", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    for profile, expected in ((swapped, (90, 60, 200)), (srgb, (200, 60, 90)), (b"broken", (200, 60, 90))):
        image = decode(encoded(stored, format, icc_profile=profile, **options))
        assert np.abs(np.subtract(image.getpixel((8, 8)), expected)).max() <= 4


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (1, 1), (200, 0, 0, 128))
    # 200 * 128/255 + 255 * 127/255 = 227.4, 0 + 127 = 127
    assert np.allclose(decode(encoded(half)).getpixel((0, 0)), (227, 127, 127), atol=1)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert decode(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    image = decode(encoded(grey))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_cmyk_and_grey_become_rgb() -> None:
    assert decode(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "JPEG")).getpixel((0, 0)) == (0, 0, 0)
    assert decode(encoded(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "known format"),
        (noise_jpeg(0)[:-200], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "known format"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "no known range"),
        (
            encoded(Image.new("L", (2, 2)), "GIF", save_all=True, append_images=[Image.new("L", (2, 2), 9)]),
            "2 frames",
        ),
    ],
)
def test_unusable_image_has_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(content)


def test_bombs_are_refused_before_they_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_PIXELS", 99)
    image = encoded(Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was unpacked"))
    with pytest.raises(ImageError, match="10 x 10 is more than 99 pixels"):
        decode(image)


def test_pillows_own_bomb_check_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # 100 is more, but not twice: Pillow would only warn
    with pytest.raises(ImageError, match="pixels"):
        decode(encoded(Image.new("RGB", (10, 10))))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^\\x1b\[2J\.mp4 is a video"):  # what a terminal would obey is escaped
        decode(tmp_path / "\x1b[2J.mp4")
    with pytest.raises(ImageError, match=r"no such file: .*gone\.png"):
        decode(tmp_path / "gone.png")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe would be waited for, and a device read until memory ends."""
    os.mkfifo(tmp_path / "pipe.png")
    for file in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match="not a regular file"):
            decode(file)
        with pytest.raises(ImageError, match="not a regular file"):
            next(media.frames_of(file))


@given(cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 1999), st.integers(1, 255)), max_size=4))
@settings(max_examples=150, deadline=None)
def test_damage_gives_an_image_or_an_image_error(cut: int, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(noise_jpeg(1))
    for place, mask in flips:
        damaged[place % len(damaged)] ^= mask
    try:
        assert decode(bytes(damaged[: max(0, len(damaged) - cut)])).mode == "RGB"
    except ImageError as error:
        assert str(error)


def test_the_right_size_is_not_resampled() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8))
    pixels = to_pixels(image, 6, 4)
    assert pixels.dtype == torch.float32
    assert torch.equal((pixels * 255).round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_the_crop_is_central() -> None:
    """A 12 x 4 image of three squares keeps its middle one at any size."""
    row = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8), 4, axis=0)
    image = Image.fromarray(np.broadcast_to(row, (4, 12, 3)).copy())
    for side in (4, 2, 8):
        centre = to_pixels(image, side, side)[:, side // 2 - 1 : side // 2 + 1, side // 2 - 1 : side // 2 + 1]
        assert torch.allclose(
            centre, torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 2, 2), atol=0.1
        )  # Lanczos reaches over


@given(width=st.integers(1, 50), height=st.integers(1, 50), to=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=60, deadline=None)
def test_any_size_fits(width: int, height: int, to: tuple[int, int]) -> None:
    pixels = to_pixels(Image.new("RGB", (width, height), (51, 102, 204)), *to)
    assert pixels.shape == (3, *to)
    assert torch.allclose(pixels, torch.tensor([0.2, 0.4, 0.8]).view(3, 1, 1).expand_as(pixels), atol=1e-6)
