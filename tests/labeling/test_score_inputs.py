"""Images and prompts to score: what is decoded, what cannot be, and which sources are refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from t2i_align.data.media import load_pixels, save_clip
from t2i_align.errors import UserError
from t2i_align.labeling.score import score
from t2i_align.utils.files import whole_lines
from tests.labeling.conftest import listed
from tests.labeling.test_score import Red, run
from tests.reward_scorers.small import write_hf_clip


def test_unreadable_images_get_a_row_with_the_error(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")  # which nobody writes to
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "3.png", format="TIFF", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "2.png", format="TIFF")
    assert run(images, Red(), tmp_path / "scores.jsonl") == pytest.approx(0.8)
    rows = {row["image"]: row for row in whole_lines(tmp_path / "scores.jsonl")}
    assert "no such file" in rows["0.png"]["error"] and "score" not in rows["0.png"]
    assert rows["1.png"]["error"] == "not a regular file" and "several pages" in rows["3.png"]["error"]
    assert "has no known range" in rows["2.png"]["error"]
    assert rows["4.png"]["score"] == pytest.approx(0.8)
    assert "over 1 images; 4 could not be scored" in capsys.readouterr().out


def test_what_never_ends_or_has_no_usable_name_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "clip").mkdir()
    os.mkfifo(tmp_path / "clip" / "0.png")
    Image.new("RGB", (8, 8), (51, 0, 0)).save(tmp_path / "good.png")
    names = ["pipe.png", "zero.png", "clip", "x" * 300, "x" * 300 + ".mp4", "good.png"]
    source = listed(tmp_path, *({"image": name, "prompt": "x"} for name in names))
    assert run(source, Red(), tmp_path / "out.jsonl") == pytest.approx(0.2)
    errors = {row["image"]: row.get("error", "") for row in whole_lines(tmp_path / "out.jsonl")}
    assert errors["good.png"] == "" and all("not a regular file" in errors[name] for name in names[:2])
    assert errors["clip"] == "no frames, expected a clip of 2 frames"
    assert all("name too long" in errors[name] for name in names[3:5])


def test_sources_of_which_nothing_can_be_scored_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent(Red):
        name = "silent"

        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.full((len(inputs),), float("nan"))

    urls = listed(tmp_path, *({"image": f"http://x/{i}.png", "prompt": "x"} for i in range(3)), name="urls.jsonl")
    with pytest.raises(UserError, match=r"urls.jsonl: none of its 3 images could be scored, such as: no such file: "):
        run(urls, Red())
    with pytest.raises(UserError, match=r"none of its 5 images .*: the scorers give no finite number"):
        run(images, Silent(), tmp_path / "out.jsonl")
    assert score(images, [Red(), Silent()], progress=False) == pytest.approx({"red": 0.4})
    printed = capsys.readouterr().out
    assert "nan" not in printed and printed.endswith("silent: no image could be scored\n")


def test_score_hands_over_the_pixels_that_training_decodes(tmp_path: Path) -> None:
    """EXIF orientation, transparency, 16-bit gray and CMYK."""

    class Recorder(Red):
        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
            received.extend(inputs)
            return super().rate(inputs, prompts)

    rotated = Image.Exif()
    rotated[0x0112] = 6
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 12, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(tmp_path / "rotated.jpg", exif=rotated)
    Image.fromarray(noise).save(tmp_path / "transparent.png")
    Image.fromarray(rng.integers(0, 65536, (8, 12), dtype=np.uint16)).save(tmp_path / "sixteen.png")
    Image.frombytes("CMYK", (12, 8), noise.tobytes()).save(tmp_path / "cmyk.jpg")
    names = ("rotated.jpg", "transparent.png", "sixteen.png", "cmyk.jpg")
    source = listed(tmp_path, *({"image": name, "prompt": "x"} for name in names))
    received: list[Tensor] = []
    score(source, [Recorder()], batch_size=1, progress=False)
    assert [tuple(pixels.shape[1:]) for pixels in received] == [(12, 8), (8, 12), (8, 12), (8, 12)]
    for name, pixels in zip(names, received, strict=True):
        assert torch.equal(pixels, load_pixels(tmp_path / name, *pixels.shape[1:])), name


def test_bad_input_is_named_before_images_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    cases = [
        ('{"image": "a.png", "prompt": "x"}\n{"image": ', "line 2: not valid JSON"),
        ("[1]", "entry 0: expected an object .*, found int"),
        ('{"photo": 1, "prompt": "x"}', "found 'photo', 'prompt'. Or give a folder .* JSONL or parquet with 'image'"),
        ('{"image": null, "prompt": "x"}', r"expected a path under 'image', found \{'image': None\}"),
        ('{"image": "a.png", "prompt": " "}', "expected text under 'prompt', found ' '"),
        ('{"image": "a.png", "prompt": "\\ud800"}', "expected text under 'prompt', found"),
        ('{"image": "\\ud800", "prompt": "x"}', "expected a path under 'image', found"),
        ("\n", "no rows in it"),
    ]
    for text, match in cases:
        file.write_text(text)
        with pytest.raises(UserError, match=match):
            run(file, Red())
    with pytest.raises(UserError, match=r"Or give a folder with samples.jsonl"):
        run(tmp_path, Red())
    file.write_text('{"image": "a.png", "prompt": "x"}')
    with pytest.raises(UserError, match="unknown scorer 'rde'"):
        score(file, ["rde"], progress=False)
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"foreign.jsonl, row 1: has no 'image'; choose another output"):
        run(file, Red(), tmp_path / "foreign.jsonl")
    for out in (tmp_path / "scores.csv", tmp_path):
        with pytest.raises(UserError, match=r"expected a file that ends in .jsonl or .parquet"):
            run(file, Red(), out)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png: no reader recognises this file"):
        run(tmp_path / "a.png", Red())


def test_images_refused_by_a_scorer_are_named(images: Path) -> None:
    with pytest.raises(UserError, match=r"0.png ... 1.png: temporal_flickering: judges clips, found single images"):
        score(images, ["temporal_flickering"], batch_size=2, progress=False)


def test_clips_from_generate_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reds of 0.2 and 0.6 in turn: 0.4 on average, and 0.4 / 3 of all three channels change from frame to frame."""
    clip = torch.zeros(6, 3, 16, 16)
    clip[::2, 0], clip[1::2, 0] = 0.2, 0.6
    save_clip(clip, tmp_path / "0.mp4", fps=8, lossless=True)
    save_clip(clip, tmp_path / "frames", fps=8)
    save_clip(clip[:1], tmp_path / "still", fps=8)
    names = ("0.mp4", "frames", "still")
    listed(tmp_path, *({"prompt": "x", "file": name} for name in names), name="samples.jsonl")
    means = score(tmp_path, [Red(), "temporal_flickering"], tmp_path / "scores.jsonl", progress=False)
    assert means == pytest.approx({"red": 0.4, "temporal_flickering": 1 - 0.4 / 3}, abs=1e-2)
    rows = whole_lines(tmp_path / "scores.jsonl")
    assert [row["image"] for row in rows if "score" in row] == ["0.mp4", "frames"] * 2
    assert "a single image, expected a clip of 2 frames" in rows[2]["error"]
    monkeypatch.setattr("t2i_align.data.media.MAX_CLIP_PIXELS", 6 * 16 * 16 - 1)
    with pytest.raises(UserError, match=r"its frames have more than 1535 pixels"):
        score(tmp_path, Red(), progress=False)


def test_unusable_groups_are_recorded(images: Path, tmp_path: Path) -> None:
    pairs = {"x": ("0.png", "1.png"), "y": ("2.png", "no")}
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": other} for prompt, (chosen, other) in pairs.items()]
    source = listed(tmp_path, *rows, name="pairs.jsonl")
    for _ in range(2):
        assert run(source, Red(), tmp_path / "scores.jsonl") == pytest.approx(0.1)
    lines = whole_lines(tmp_path / "scores.jsonl")
    assert len(lines) == 3 and "pairs.jsonl:2" in lines[2]["image"] and "no" in lines[2]["error"]
    assert lines[2]["sha256"] is None


def test_prompt_refused_by_a_scorer_is_recorded(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    prompts = ["a large red circle on a white background", "a photo of my cat", "x\u0000"]
    names = ["a.png", "a.png", "a\u0000.png"]
    rows = [{"image": name, "prompt": prompt} for name, prompt in zip(names, prompts, strict=True)]
    score(listed(tmp_path, *rows), "oracle", tmp_path / "scores.jsonl", progress=False)
    scored, unknown, unreadable = sorted(
        whole_lines(tmp_path / "scores.jsonl"), key=lambda row: prompts.index(row["prompt"])
    )
    assert scored["score"] is not None and "my cat" in unknown["error"] and "null byte" in unreadable["error"]


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "1"])
def test_images_of_every_mode_and_of_one_pixel_are_scored(mode: str, tmp_path: Path) -> None:
    Image.new("RGB" if mode == "P" else mode, (1, 1)).convert(mode).save(tmp_path / "a.tif")
    run(listed(tmp_path, {"image": "a.tif", "prompt": "x"}), Red(), tmp_path / "out.jsonl")
    (row,) = whole_lines(tmp_path / "out.jsonl")
    assert "score" in row and "error" not in row


def test_prompts_that_are_cut_are_counted(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of letters, 75 fit between the two marks of 77 tokens."""
    rows = [{"image": "0.png", "prompt": "x" * count} for count in (75, 76, 90)]
    scorer = f"hf-clip:{write_hf_clip(tmp_path / 'clip')}"
    score(listed(tmp_path, *rows, name="long.jsonl"), scorer, progress=False)
    assert "over 3 images; 2 prompts were longer than its text encoder reads, and cut" in capsys.readouterr().out
