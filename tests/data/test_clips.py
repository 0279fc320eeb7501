"""Clips: every format read frame by frame, at the rate that is wanted, or refused with a reason."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.data import media
from t2i_align.data.media import ImageError, MediaSize, decode, frame_files, frames_of, load, save_clip, whole_clip
from t2i_align.data.schema import Media

LEVELS = (20, 60, 100, 140, 180, 220, 40, 200)  # grey level of each frame
RATE = 8
CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}


def grey_clip(height: int = 32, width: int = 48) -> torch.Tensor:
    return (torch.tensor(LEVELS, dtype=torch.uint8).view(-1, 1, 1, 1)).expand(-1, 3, height, width)


def noise_clip(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(frames, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def write(file: Path, clip: torch.Tensor | None = None) -> Path:
    frames = (grey_clip() if clip is None else clip).permute(0, 2, 3, 1).numpy()
    if file.suffix in CODECS:
        imageio.imwrite(file, frames, plugin="FFMPEG", fps=RATE, codec=CODECS[file.suffix], macro_block_size=1)
    else:
        imageio.imwrite(file, frames, plugin="pillow", duration=1000 / RATE, loop=0)
    return file


def load_clip(source: Media, frames: int, height: int, width: int, fps: float | None = None) -> torch.Tensor:
    return load(source, MediaSize(height, width, frames, fps)).pixels


def greys(clip: torch.Tensor) -> list[int]:
    assert clip.dtype == torch.float32
    return (clip.mean((1, 2, 3)) * 255).round().int().tolist()


def ffmpeg(*arguments: object) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


@pytest.mark.parametrize("ending", [*CODECS, ".gif", ".webp", ".apng"])
def test_every_format_gives_its_frames_at_the_wanted_rate(tmp_path: Path, ending: str) -> None:
    """At 8 a second, frame 2i is shown at i / 4; at 3 a second the times 0, 1/3, 2/3 fall into frames 0, 2, 5."""
    file = write(tmp_path / f"clip{ending}")
    assert load_clip(file, 8, 32, 48).shape == (8, 3, 32, 48)
    assert np.abs(np.subtract(greys(load_clip(file, 8, 32, 48)), LEVELS)).max() <= 2
    assert np.abs(np.subtract(greys(load_clip(file, 4, 32, 48, fps=4)), LEVELS[::2])).max() <= 2
    assert np.abs(np.subtract(greys(load_clip(file, 3, 32, 48, fps=3)), [20, 100, 220])).max() <= 2
    assert np.abs(np.subtract(greys(load_clip(file.read_bytes(), 2, 32, 48)), LEVELS[:2])).max() <= 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.webp", "clip"])
def test_saved_clip_is_read_again(tmp_path: Path, name: str) -> None:
    save_clip(grey_clip().float() / 255, tmp_path / name, RATE)
    assert np.abs(np.subtract(greys(load_clip(tmp_path / name, 8, 32, 48)), LEVELS)).max() <= 2
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_frames_follow_the_rules_of_images(tmp_path: Path) -> None:
    """Scaled to cover and cropped centrally, exactly as each frame would be on its own."""
    save_clip(noise_clip(2), tmp_path / "clip", RATE)
    clip = load_clip(tmp_path / "clip", 2, 16, 24)
    for file, frame in zip(frame_files(tmp_path / "clip"), clip, strict=True):
        assert torch.equal(frame, media.load_pixels(file, 16, 24))
    assert load(tmp_path / "clip", MediaSize(16, 24, 2)).size == (64, 64)


def test_folders_are_read_in_natural_order(tmp_path: Path) -> None:
    for number, level in enumerate(LEVELS, start=5):
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / f"frame {number}.png")
    (tmp_path / "caption.txt").write_text("no frame")
    assert greys(load_clip(tmp_path, 8, 4, 4)) == list(LEVELS)


def test_only_the_frames_that_are_needed_are_decoded(tmp_path: Path) -> None:
    file = write(tmp_path / "clip.gif", (noise_clip(12) * 255).byte())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert load_clip(file, 3, 64, 64).shape == (3, 3, 64, 64)
    with pytest.raises(ImageError):
        load_clip(file, 12, 64, 64)


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    ffmpeg("-display_rotation", 90, "-i", write(tmp_path / "flat.mp4"), "-c", "copy", tmp_path / "turned.mp4")
    assert next(iter(frames_of(tmp_path / "turned.mp4", 1))).size == (32, 48)


def cut(file: Path, share: float) -> Path:
    content = file.read_bytes()
    out = file.with_name(f"cut-{file.name}")
    out.write_bytes(content[: int(len(content) * share)])
    return out


def test_unusable_clip_has_a_reason(tmp_path: Path) -> None:
    text, playlist, audio = tmp_path / "text.mp4", tmp_path / "playlist.mp4", tmp_path / "audio.mp4"
    text.write_text("no video at all\n" * 9)
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{write(tmp_path / 'other.mp4')}\n")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", audio)
    grey = write(tmp_path / "grey.mp4")
    gif = write(tmp_path / "grey.gif")
    write(tmp_path / "start.webm", noise_clip(24).mul(255).byte())
    ffmpeg("-i", write(tmp_path / "end.mp4", noise_clip(24).mul(255).byte()), "-movflags", "+faststart",
           tmp_path / "start.mp4")  # fmt: skip
    (tmp_path / "empty").mkdir()
    save_clip(noise_clip(2), tmp_path / "mixed", RATE)
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "00001.png")
    pages = io.BytesIO()
    Image.new("L", (8, 8)).save(pages, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    cases = [
        (grey, 9, None, "8 frames, expected a clip of 9"),
        (grey, 5, 4, "4 frames at 4 a second, expected a clip of 5"),
        (grey, 8, 16, "8 frames a second, too few for 16"),
        (gif, 8, 16, "8.33 frames a second, too few for 16"),
        (tmp_path / "mixed", 2, 8, "has no frame rate"),
        (tmp_path / "mixed", 2, None, r"frame 2 has \(9, 9\) pixels, the first has \(64, 64\)"),
        (tmp_path / "empty", 2, None, "no frames"),
        (tmp_path / "mixed" / "00000.png", 2, None, "a single image, expected a clip of 2"),
        (tmp_path / "gone.mp4", 2, None, r"no such file: .*gone\.mp4"),
        (text, 2, None, "not a video that can be read"),
        (playlist, 2, None, "not a video that can be read"),
        (audio, 2, None, "no video in it"),
        (cut(tmp_path / "end.mp4", 0.5), 2, None, "not a video that can be read"),
        (cut(tmp_path / "start.mp4", 0.5), 24, None, r"\d frames, expected a clip of 24"),
        (cut(tmp_path / "start.webm", 0.5), 24, None, r"\d frames, expected a clip of 24"),
        (pages.getvalue(), 2, None, "several pages"),
        (b"", 2, None, "empty"),
    ]
    for source, frames, fps, reason in cases:
        with pytest.raises(ImageError, match=reason):
            load_clip(source, frames, 32, 48, fps)


def test_damage_ends_a_video(tmp_path: Path) -> None:
    """ffmpeg would patch a broken frame up from its neighbours; the clip must not hold it."""
    file = write(tmp_path / "clip.mp4", (noise_clip(24) * 255).byte())
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 400):
        content[place] ^= 0x5A
    file.write_bytes(content)
    with pytest.raises(ImageError, match=r"^\d frames, expected a clip of 24"):
        load_clip(file, 24, 64, 64)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_bombs_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_clip(grey_clip(), tmp_path / name, RATE)
    monkeypatch.setattr(media, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(ImageError, match="48 x 32 is more than 1535 pixels"):
        load_clip(tmp_path / name, 2, 32, 48)


def test_a_clip_that_is_held_as_a_whole_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "clip.gif")
    assert whole_clip(file).shape == (8, 3, 32, 48)
    monkeypatch.setattr(media, "MAX_CLIP_PIXELS", 8 * 32 * 48 - 1)
    with pytest.raises(ImageError, match="its frames have more than 12287 pixels"):
        whole_clip(file)


def test_images_and_clips_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"clip\.mp4 is a video, expected an image"):
        decode(write(tmp_path / "clip.mp4"))
    with pytest.raises(ImageError, match="is a folder, expected an image"):
        decode(tmp_path)
    with pytest.raises(ImageError, match="8 frames or pages, expected a single image"):
        decode(write(tmp_path / "clip.gif"))
    Image.new("RGB", (6, 4), (51, 102, 204)).save(tmp_path / "image.png")
    single = load_clip(tmp_path / "image.png", 1, 4, 6)  # a clip of one frame is an image
    assert torch.equal(single[0], load(tmp_path / "image.png", MediaSize(4, 6)).pixels)
