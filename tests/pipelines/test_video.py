"""Clips from end to end on a tiny Wan: read, encoded, trained on, generated, validated and compared."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import pipelines
from pipelines import PipelineError
from pipelines.wan import Wan
from reward_scorers import Scorer
from t2i_align import align, evaluate
from t2i_align.data.media import MediaSize, load, save_clip
from t2i_align.errors import UserError
from t2i_align.inference.generate import generate, sample
from t2i_align.labeling.score import score
from t2i_align.training.rewards import Rewarder
from tests.data.test_examples import StandIn, write_jsonl
from tests.pipelines.conftest import PathOf, first_batch, opened
from tests.runs import image, jsonl_clips, jsonl_pairs, moving_clip, run_values
from tests.tiny import random_lora

FRAMES, RATE = 9, 16
SIZE = (32, 32), FRAMES


class Clips(StandIn):
    """The stand-in as a family of clips: latents are means over 2 x 2 pixels of every second frame."""

    family, video = "stand-in", True

    def __init__(self) -> None:
        super().__init__()
        self.at_once: list[int] = []

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        assert frames is not None

    def latent_times(self, frames: int, fps: float | None) -> list[float]:
        return [2 * number / (fps or RATE) for number in range((frames + 1) // 2)]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        assert pixels.ndim == 5 and pixels.shape[2] == 3
        self.at_once.append(len(pixels))
        means = super().encode_pixels(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return means[:, ::2].transpose(1, 2)


@pytest.fixture(scope="session")
def wan_path(path: PathOf) -> Path:
    return path("wan")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of six pairs: GIFs, WebPs, and folders of frames."""
    return jsonl_clips(tmp_path_factory.mktemp("clips"), FRAMES, (".gif", ".webp", ""))


def skipped(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.glob("cache/*/skipped.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


# Data -----------------------------------------------------------------------------------------------------------------


def test_cache_and_on_the_fly_encode_the_same_clips_one_by_one(clips: Path, tmp_path: Path) -> None:
    cached, live = Clips(), Clips()
    one = first_batch(opened(tmp_path, clips, cached, *SIZE), 6)
    other = first_batch(opened(tmp_path, clips, live, *SIZE, cache=False), 6)
    assert one.keys == other.keys and one.latents.shape == (6, 2, 3, 5, 16, 16) == other.latents.shape
    assert torch.equal(one.latents, other.latents.half().float())  # the cache's precision
    assert set(cached.at_once) == {1} == set(live.at_once)
    number = one.keys.index("0/clips.jsonl:3")  # the first pair of folders: they lose nothing on the way
    clean = moving_clip(4, FRAMES).float().unsqueeze(0) / 255
    assert torch.equal(other.latents[number, 0], Clips().encode_pixels(clean)[0])


def test_unusable_clips_are_skipped_with_a_reason(tmp_path: Path) -> None:
    for number in range(2):
        save_clip(moving_clip(number, FRAMES), tmp_path / f"{number}.gif", RATE)
        save_clip(moving_clip(number, frames=5), tmp_path / f"short{number}.gif", RATE)
    image(0).save(tmp_path / "image.png")
    (tmp_path / "text.mp4").write_text("no video")
    good = {"prompt": "good", "chosen": "0.gif", "rejected": "1.gif"}
    lines = [good, *({**good, "rejected": name} for name in ("short0.gif", "image.png", "text.mp4", "gone.mp4"))]
    source = opened(tmp_path, write_jsonl(tmp_path / "d.jsonl", lines), Clips(), *SIZE)
    assert source.counts["groups"] == 1 and source.counts["skipped"] == 4
    reasons = [row["reason"] for row in skipped(tmp_path)]
    for reason, expected in zip(reasons, ("5 frames, expected a clip of 9 frames", "a single image, expected a clip",
                                          "not a video that can be read", "no such image"), strict=True):  # fmt: skip
        assert expected in reason


def test_other_frames_or_rates_are_another_cache(clips: Path, tmp_path: Path) -> None:
    line = {"prompt": "p", "chosen": "0_good.gif", "rejected": "0_bad.gif"}
    data = write_jsonl(clips.parent / "gifs.jsonl", [line])
    fingerprints = set()
    for frames, options in ((9, {}), (5, {}), (5, {"fps": 8.0})):
        opened(tmp_path, data, Clips(), (32, 32), frames, **options)
        fingerprints.add(opened(tmp_path, data, Clips(), (32, 32), frames, cache=False, **options).fingerprint)
    assert len(list((tmp_path / "cache").iterdir())) == 3 == len(fingerprints)
    folders = {folder: (folder / "fingerprint.json").read_text() for folder in (tmp_path / "cache").iterdir()}
    (nine,) = (folder for folder, text in folders.items() if '"frames": 9' in text)
    with pytest.raises(UserError, match=r"does not fit model .*: frames is 9 there, 5 here"):
        opened(tmp_path, nine, Clips(), (32, 32), 5)


def test_a_frame_that_changes_is_another_cache(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_clip(moving_clip(0, FRAMES), tmp_path / name, RATE)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "videos": ["a", "b"], "scores": [1, 0]}])
    opened(tmp_path, data, Clips(), *SIZE)
    image(7).save(tmp_path / "b" / "00004.png")
    opened(tmp_path, data, Clips(), *SIZE)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_winner_and_loser_folders_hold_videos(tmp_path: Path) -> None:
    for side, seed in (("chosen", 0), ("rejected", 1)):
        (tmp_path / "d" / side).mkdir(parents=True)
        save_clip(moving_clip(seed, FRAMES), tmp_path / "d" / side / "fox.mp4", RATE)
    (tmp_path / "d" / "chosen" / "fox.txt").write_text("a fox runs")
    batch = first_batch(opened(tmp_path, tmp_path / "d", Clips(), *SIZE), 6)
    assert batch.latents.shape == (6, 2, 3, 5, 16, 16)


# Models ---------------------------------------------------------------------------------------------------------------


def test_images_and_clips_do_not_mix(wan_path: Path, sd_path: Path, clips: Path, tmp_path: Path) -> None:
    images = jsonl_pairs(tmp_path / "images", count=2)
    videos = tmp_path / "videos.jsonl"
    save_clip(moving_clip(0, FRAMES), tmp_path / "fox.mp4", RATE)
    videos.write_text(json.dumps({"prompt": "p", "chosen": "fox.mp4", "rejected": "fox.mp4"}))
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (sd_path, videos, {}, r"no usable group among 1 rows.*fox\.mp4 is a video, expected an image"),
        (sd_path, clips, {}, "no usable group among 6 rows.*9 frames or pages, expected a single image"),
        (wan_path, images, {}, "no usable group among 2 rows.*a single image, expected a clip of 9 frames"),
        (sd_path, images, {"data__frames": 9}, "sd makes images, but a clip of 9 frames was asked for"),
        (sd_path, images, {"data__fps": 8.0}, r"data\.fps is for clips, and sd makes images"),
        (wan_path, clips, {"data__frames": 8}, r"frames must be 4k \+ 1; 5 and 9 fit"),
        (sd_path, images, {"train__timestep_shift": 3}, "a timestep shift of 3.0 is for flow models; sd has none"),
    ]
    for model, data, changes, message in cases:
        with pytest.raises((UserError, PipelineError), match=message):
            align(run_values(model, data, tmp_path / "run", **changes), progress=False)
        assert not (tmp_path / "run").exists()


def test_the_timestep_shift_reaches_training(
    wan_path: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny checkpoint's own shift is 3; with another the same quantiles become other times."""
    times: list[Tensor] = []
    runs: list[Tensor] = []
    predict = Wan.predict

    def spied(self: Any, noisy: Tensor, timesteps: Tensor, *rest: Any, **named: Any) -> Tensor:
        times.append(timesteps.clone())
        return predict(self, noisy, timesteps, *rest, **named)

    monkeypatch.setattr(Wan, "predict", spied)
    for shift in ("model", 3.0, 1):
        changes = {"train__steps": 1, "train__batch_size": 2, "train__timestep_shift": shift, "data__cache": False}
        align(run_values(wan_path, clips, tmp_path / str(shift), **changes), progress=False)
        runs.append(times[-1][::2] / 1000)  # the policy's, of the only step
    own, three, one = runs
    assert torch.equal(own, three)
    torch.testing.assert_close(own, 3 * one / (1 + 2 * one))


def test_low_noise_expert_and_bf16_encoders_come_from_the_configuration(
    path: PathOf, clips: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": 1, "train__batch_size": 2, "model__expert": "low", "train__precision": "bf16"}
    result = align(run_values(path("wan-experts"), clips, tmp_path / "run", **changes), progress=False)
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["fingerprint"]["encoders"].endswith(", text_encoder in bf16")
    evaluated = evaluate(
        aligned=result.output_dir, prompts=["p"], scorers=[Brightness()], out=tmp_path / "evaluation",
        steps=2, guidance=1.0, progress=False,
    )  # fmt: skip
    assert evaluated.settings["expert"] == "low"


# Out ------------------------------------------------------------------------------------------------------------------


class Brightness(Scorer):
    """Mean of a frame; part: how many frames it was given."""

    name, version = "brightness", "1"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def rate(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(pixels)
        return pixels.mean((1, 2, 3))


def test_generated_clips_are_videos_with_a_line_each(wan_path: Path, tmp_path: Path) -> None:
    listing = generate(wan_path, ["cat", "dog"], tmp_path / "out", frames=5, fps=4, steps=2, guidance=1.0,
                       batch_size=1, progress=False)  # fmt: skip
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00000.mp4", "00001.mp4"] and rows[0]["fps"] == 4
    seeds = [row["seed"] for row in rows]
    made = sample(pipelines.load(wan_path), ["cat", "dog"], seeds, frames=5, steps=2, guidance=1.0)
    for row, clip in zip(rows, made, strict=True):
        assert clip.dtype == torch.uint8 and clip.shape == (5, 3, 32, 32)
        saved = load(tmp_path / "out" / row["file"], MediaSize(32, 32, 5)).pixels
        assert (saved - clip.float() / 255).abs().mean() < 0.05  # H.264, with colour at half the resolution
        slower = load(tmp_path / "out" / row["file"], MediaSize(32, 32, 3, fps=2)).pixels  # 5 frames at 4 are 1.25 s
        assert slower.shape[0] == 3
    generate(wan_path, ["sun"], tmp_path / "out", steps=1, guidance=1.0, force=True, progress=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["00000.mp4", "samples.jsonl"]
    generate(wan_path, ["sun"], tmp_path / "out", frames=1, steps=1, guidance=1.0, force=True, progress=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["00000.png", "samples.jsonl"]
    assert score(tmp_path / "out", [Brightness()], progress=False)["brightness"] > 0
    with pytest.raises(PipelineError, match="frames must be 4k"):
        generate(wan_path, ["cat"], tmp_path / "more", frames=4, progress=False)


@pytest.mark.parametrize(("format", "name"), [("webm", "00000.webm"), ("gif", "00000.gif"), ("frames", "00000")])
def test_generated_clips_have_the_wanted_format(wan_path: Path, tmp_path: Path, format: Any, name: str) -> None:
    """They are scored as they are read, and replaced by another run; a folder that holds more is not touched."""
    options: dict[str, Any] = {"frames": 5, "steps": 1, "guidance": 1.0, "progress": False}
    generate(wan_path, ["cat"], tmp_path, format=format, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == [name, "samples.jsonl"]
    (made,) = generate(wan_path, ["cat"], None, **options)
    expected = (made.float() / 255).mean().item()
    assert score(tmp_path, [Brightness()], progress=False)["brightness"] == pytest.approx(expected, abs=0.02)
    if format == "frames":
        (tmp_path / name / "note.txt").write_text("mine")
        with pytest.raises(UserError, match="00000: is not of an earlier run"):
            generate(wan_path, ["cat"], tmp_path, force=True, format=format, **options)
        (tmp_path / name / "note.txt").unlink()
    generate(wan_path, ["cat"], tmp_path, force=True, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.mp4", "samples.jsonl"]


def test_an_evaluation_scores_frames_and_shows_videos(wan_path: Path, tmp_path: Path) -> None:
    scorer = Brightness()
    result = evaluate(
        base=wan_path, aligned=random_lora(wan_path, tmp_path / "lora"), prompts=["cat", "dog"], scorers=[scorer],
        out=tmp_path / "out", frames=5, steps=2, guidance=1.0, progress=False,
    )  # fmt: skip
    assert [len(pixels) for pixels in scorer.seen] == [5] * 4  # a clip at a time, both sides
    assert all(torch.equal((pixels * 255).round() / 255, pixels) for pixels in scorer.seen)
    assert result.settings["frames"] == 5 and result.settings["fps"] == 16.0
    pair = json.loads((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()[0])
    expected = [pixels.mean().item() for pixels in (scorer.seen[0], scorer.seen[2])]
    assert [pair["scores"]["brightness"][side] for side in ("before", "after")] == pytest.approx(expected, abs=1e-6)
    report = (tmp_path / "out" / "report.html").read_text()
    shown = re.findall(r'<video src="data:video/mp4;base64,([A-Za-z0-9+/=]+)" width="256" height="256"', report)
    assert len(shown) >= 4 and "5 frames at 16.0 a second" in report and "media-src data:" in report
    played = load(base64.b64decode(shown[0]), MediaSize(256, 256, 5)).pixels
    enlarged = scorer.seen[0].repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert (played - enlarged).abs().mean() < 0.03
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["pairs.jsonl", "report.html", "result.json"]


def test_a_reward_of_the_first_latent_frames(wan_path: Path) -> None:
    """One is the first image: the scorer sees nothing else, and no gradient reaches the other latents."""
    pipeline, scorer = pipelines.load(wan_path), Brightness()
    latents = pipeline.encode_pixels(torch.rand(1, 9, 3, 32, 32)).requires_grad_()
    reward, _ = Rewarder(pipeline, scorer, latent_frames=1)(latents, ["cat"])
    (gradient,) = torch.autograd.grad(reward.sum(), latents)
    assert [len(pixels) for pixels in scorer.seen] == [1]
    assert gradient[:, :, 0].abs().sum() > 0 and gradient[:, :, 1:].abs().sum() == 0


def test_a_clip_model_is_not_compared_with_an_image_model(
    wan_path: Path, sd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_align.evaluation.sides.sample", None)  # it is refused before anything is drawn
    with pytest.raises(UserError, match=r"the base makes images and .*wan makes clips: they cannot be compared"):
        evaluate(base=sd_path, aligned=wan_path, prompts=["cat"], scorers=[Brightness()], out=tmp_path / "out",
                 steps=1, guidance=1.0, progress=False)  # fmt: skip


def test_validation_leaves_a_contact_sheet_and_a_video(wan_path: Path, clips: Path, tmp_path: Path) -> None:
    """Two clips in strips of 5 of their 9 frames (every second), 6 times as large, that of step 0 above that of now.

    A prompt takes 2 (192 + 8) pixels for the strips, 3 lines of 17 and 8 between; the head takes 30.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog\n")
    validation = {"every": 1, "prompts": str(prompts), "steps": 1, "guidance": 1.0, "count": 2}
    changes = {"train__steps": 1, "train__batch_size": 2, "validation": validation}
    align(run_values(wan_path, clips, tmp_path / "run", **changes), progress=False)
    folder = tmp_path / "run" / "validation"
    names = [f"step_{step:06d}.{ending}" for step in (0, 1) for ending in ("mp4", "png")]
    assert sorted(file.name for file in folder.iterdir()) == ["before", *names]
    assert Image.open(folder / names[3]).size == (5 * 192 + 3 * 8, 30 + 2 * (2 * 200 + 3 * 17 + 8))
    column = load(folder / names[0], MediaSize(70, 36, FRAMES)).pixels  # of two clips
    assert column.shape == (FRAMES, 3, 70, 36)
