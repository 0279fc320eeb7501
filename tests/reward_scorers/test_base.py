"""The scorers' contract: what is refused, the mean over frames, images of mixed sizes, the registry."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

import reward_scorers
from reward_scorers import Scorer, ScorerError
from reward_scorers.images import to_rgb
from t2i_align.data.media import decode, to_pixels


class Red(Scorer):
    """The mean of the red channel; its part is NaN on images without any green."""

    name = "red"
    version = "1"
    differentiable = True

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        red, green, _ = inputs.mean((2, 3)).unbind(1)
        return red, {"green": torch.where(green > 0, green, torch.nan)}


def test_a_clip_gets_the_mean_over_its_frames_and_a_part_over_the_frames_it_applies_to() -> None:
    """Red of the frames 0.2 and 0.6 gives 0.4; green is 0 (not applicable) and 0.5, so its mean is 0.5.

    Each of the red values of 2 frames of 4 x 4 pixels has the gradient 1 / 32.
    """
    clip = torch.zeros(1, 2, 3, 4, 4)
    clip[0, 0, 0], clip[0, 1, 0], clip[0, 1, 1] = 0.2, 0.6, 0.5
    score, parts = Red().judge(clip.requires_grad_(), ["x"])
    (gradient,) = torch.autograd.grad(score, clip)
    assert score.item() == pytest.approx(0.4) == Red().score(clip, ["x"]).item()
    assert parts["green"].item() == 0.5 and (gradient[0, :, 0] == 1 / 32).all()


def test_images_of_mixed_sizes_and_modes_keep_their_order() -> None:
    images = [
        Image.new("RGB", (3, 5), (255, 0, 0)),
        Image.new("L", (8, 8), 51),  # 51 / 255 = 0.2
        Image.new("RGB", (3, 5), (102, 255, 0)),  # 0.4
        Image.new("1", (1, 1), 0),
    ]
    score, parts = Red().judge(images, list("abcd"))
    torch.testing.assert_close(score, torch.tensor([1.0, 0.2, 0.4, 0.0]))
    torch.testing.assert_close(parts["green"], torch.tensor([torch.nan, 0.2, 1.0, torch.nan]), equal_nan=True)
    torch.testing.assert_close(Red().score_images(images, list("abcd")), score)


PIXELS = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("pixels", "prompts", "match"),
    [
        (PIXELS, ["a"], "expected a list of 2, one per image, found 1 prompts"),
        (PIXELS, "ab", "found 'ab'"),
        (PIXELS, None, "expected a list of 2, one per image, found None"),
        (PIXELS, ["a", " "], r"prompts\[1\]: expected text, found ' '"),
        (PIXELS, [None, "a"], r"prompts\[0\]: expected text, found None"),
        (PIXELS * 2 - 1.5, ["a", "b"], r"expected values in \[0, 1\]"),
        (PIXELS * 255, ["a", "b"], r"expected values in \[0, 1\]"),
        ((PIXELS * 255).byte(), ["a", "b"], "floating-point"),
        (PIXELS.log() * float("nan"), ["a", "b"], r"rows \[0, 1\] hold NaN"),
        (torch.stack([PIXELS[0], PIXELS[1] * float("nan")]), ["a", "b"], r"rows \[1\] hold NaN"),
        (PIXELS[:, :2], ["a", "b"], r"found \[2, 2, 4, 4\]"),
        (PIXELS[0], ["a", "b", "c"], r"found \[3, 4, 4\]"),
        (PIXELS[:0], [], r"found \[0, 3, 4, 4\]"),
    ],
)
def test_bad_input_is_named(pixels: Tensor, prompts: Sequence[str], match: str) -> None:
    for call in (Red().score, Red().judge):
        with pytest.raises(ScorerError, match=match):
            call(pixels, prompts)


def test_animated_and_foreign_images_are_named(tmp_path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ScorerError, match=r"images\[1\]: an animated image of 2 frames"):
        Red().score_images([frames[0], Image.open(tmp_path / "two.gif")], ["a", "b"])
    (tmp_path / "cut.png").write_bytes(noise_png()[:200])
    cases: list[tuple[Any, str]] = [
        (["a.png"], r"images\[0\]: expected a PIL image, found str"),
        (frames[0], "images: expected a list of PIL images, found Image"),
        ([], "images: expected a list of PIL images, found none"),
        ([Image.new("RGB", (0, 5))], r"images\[0\]: an image of 0 x 5 pixels"),
        ([Image.open(tmp_path / "cut.png")], r"images\[0\]: cannot be decoded: image file is truncated"),
        *(([Image.new(mode, (4, 4))], f"pixels of mode {mode} have no known range") for mode in ("F", "I")),
    ]
    for images, match in cases:
        with pytest.raises(ScorerError, match=match):
            Red().score_images(images, ["a"])


def odd_images(folder: Path) -> dict[str, Path]:
    """A file of each kind that needs more than reading its pixels."""
    gradient = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    red = Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    hidden = red.convert("RGBA")
    hidden.putalpha(gradient)
    sixteen = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    palette = red.quantize(16)
    saved = {
        "rotated.jpg": (red, {"exif": exif}),
        "rotated.png": (red, {"exif": exif}),
        "transparent.png": (hidden, {}),
        "transparent_gray.png": (hidden.convert("LA"), {}),
        "transparent_palette.png": (palette, {"transparency": 0}),
        "transparent_colour.png": (red, {"transparency": red.getpixel((0, 0))}),
        "sixteen.png": (sixteen, {}),
        "cmyk.jpg": (red.convert("CMYK"), {}),
        "palette.png": (palette, {}),
        "phone.jpg": (red, {"format": "MPO", "save_all": True, "append_images": [red.resize((4, 4))]}),
    }
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in saved}


def test_images_of_every_kind_are_decoded_as_training_data_are(tmp_path: Path) -> None:
    """So a scorer gives a file, or the image that Pillow opens from it, the score of the pixels that are trained on."""
    scores = {}
    for name, file in odd_images(tmp_path).items():
        np.testing.assert_array_equal(to_rgb(Image.open(file)), decode(file), err_msg=name)
        scores[name] = Red().score_images([Image.open(file)], ["a"])
        torch.testing.assert_close(scores[name], Red().score(to_pixels(decode(file), 8, 8)[None], ["a"]), msg=name)
        raw = Image.open(file).convert("RGB")
        changed = not np.array_equal(raw, to_rgb(Image.open(file)))
        assert changed == (not name.startswith(("cmyk", "palette", "phone"))), name


def noise_png() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(stream, format="PNG")
    return stream.getvalue()


def test_scores_of_another_shape_are_refused() -> None:
    class Flat(Red):
        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Any:
            return inputs.mean()

    with pytest.raises(ScorerError, match=r"red: the score: expected shape \[2\], found \[\]"):
        Flat().score(PIXELS, ["a", "b"])


def test_registry_builds_by_name_and_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder is found behind a colon too."""
    given: list[str] = []
    reward_scorers.register("red-for-test")(lambda argument: given.append(argument) or Red())
    monkeypatch.setenv("HOME", "/home/me")
    for argument in ("whatever:else", "~/a.pt", "b:~/a.pt", "a~/b"):
        assert isinstance(reward_scorers.build(f"red-for-test:{argument}"), Red)
    assert given == ["whatever:else", "/home/me/a.pt", "b:/home/me/a.pt", "a~/b"]
    with pytest.raises(ScorerError, match=r"Did you mean 'red-for-test'.*Choices: aesthetic, background_c"):
        reward_scorers.build("red-for-tes")


def test_the_package_stands_alone() -> None:
    """Scorers import nothing of t2i_align or pipelines, and a model's library only when it is built."""
    foreign = "('t2i_align', 'pipelines', 'open_clip', 'timm')"
    code = f"import sys, reward_scorers; print([m for m in sys.modules if m.startswith({foreign})])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
