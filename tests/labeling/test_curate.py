"""Pairs of clips from real ones: what they share, where they start, what continues, and which clips are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipelines
from pipelines import RectifiedFlow, TrainablePipeline
from t2i_align.data import readers
from t2i_align.data.batch import Conditioning
from t2i_align.data.media import MediaSize, load, save_clip, whole_clip
from t2i_align.data.schema import Group
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.diffusion.sampling import Sampler, without_gradient
from t2i_align.errors import UserError
from t2i_align.labeling import curate
from t2i_align.labeling.curate import Maker, pairs, whole_process
from tests.data.test_clips import ffmpeg
from tests.labeling.conftest import rows, skipped
from tests.runs import image, moving_clip

RATE = 16
QUIET: dict[str, Any] = {"steps": 10, "guidance": 2.0, "fps": RATE, "progress": False}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with captions: a video, a folder of frames, and a video of odd sides at a varying rate."""
    folder = tmp_path_factory.mktemp("real")
    save_clip(moving_clip(0, 17), folder / "a.mp4", RATE)
    save_clip(moving_clip(1, 17), folder / "b", RATE)
    save_clip(moving_clip(2, 40), folder / "plain.mp4", 2 * RATE)
    vary(folder / "plain.mp4", folder / "c.mkv", ",scale=47:33")
    (folder / "plain.mp4").unlink()
    for name, text in (("a", "a fox runs"), ("b", "an owl flies"), ("c", "a cat sleeps")):
        (folder / f"{name}.txt").write_text(text)
    return folder


def vary(file: Path, out: Path, more: str = "") -> None:
    """A copy whose frames are held twice as long in its middle."""
    times = "setpts='if(lt(N,10),N,if(lt(N,20),2*N-10,N+10))/32/TB'"
    ffmpeg("-i", file, "-vf", times + more, "-fps_mode", "vfr", "-pix_fmt", "yuv444p", out)


def test_a_varying_rate_is_read_by_time(tmp_path: Path) -> None:
    """Time 2k / 32 is frame 2k, then (2k + 10) / 2 while frames are held for two 32nds, then 2k - 10.

    The file's own times are in milliseconds, so that a frame may begin just after the time of the one before.
    """
    save_clip(moving_clip(2, 40), tmp_path / "plain.mp4", 2 * RATE)
    vary(tmp_path / "plain.mp4", tmp_path / "vfr.mkv")
    clip, frames = load(tmp_path / "vfr.mkv", MediaSize(32, 32, 20, RATE)).pixels, moving_clip(2, 40).float() / 255
    nearest = [int((frames[:32] - frame).square().mean((1, 2, 3)).argmin()) for frame in clip]
    expected = [0, 2, 4, 6, 8, *range(10, 20), 20, 22, 24, 26, 28]
    assert all(found in (frame - 1, frame) for found, frame in zip(nearest, expected, strict=True)), nearest


@pytest.mark.parametrize("name", ["wan", "wan-experts", "cogvideox", "cogvideox-1.5", "ltx"])
def test_every_family_makes_two_clips_of_each_real_one(
    name: str, path: Callable[[str], Path], real: Path, tmp_path: Path
) -> None:
    """Equal in nothing but their size; read again as ties with what they were made from."""
    summary = pairs(real, tmp_path, model=path(name), lossless=True, **QUIET)
    assert summary.groups == 3 and summary.skipped == 0
    pipeline = pipelines.load(path(name), encoders=False)
    for group in readers.read(tmp_path / "pairs.jsonl"):
        assert isinstance(group, Group) and group.is_tie
        one, other = map(whole_clip, group.candidates)
        assert one.shape == other.shape == (pipeline.default_frames, 3, *pipeline.default_size)
        assert not torch.equal(one, other)
    levels = [row["level"] for row in rows(tmp_path / "pairs.jsonl").values()]
    assert all(0.65 <= level <= 0.8 for level in levels)
    assert [row["prompt"] for row in rows(tmp_path / "pairs.jsonl").values()] == [
        "a fox runs",
        "an owl flies",
        "a cat sleeps",
    ]


@pytest.mark.parametrize(
    ("name", "steps"), [("wan", 40), ("wan-experts", 40), ("ltx", 40), ("cogvideox", 40), ("cogvideox", 7)]
)
def test_levels_are_those_of_the_familys_own_sampler(name: str, steps: int, path: Callable[[str], Path]) -> None:
    """Shifted, also where the shift depends on the number of tokens (LTX, up to its stretched end)."""
    pipeline = pipelines.load(path(name))
    size = MediaSize(*pipeline.default_size, pipeline.default_frames)
    process, scheduler = whole_process(pipeline, size), pipeline.pipe.scheduler
    ours = process.sampling_times(steps).double()
    if name == "ltx":
        tokens = pipeline.tokens(size.height, size.width, size.frames)
        mu = 0.95 + (2.05 - 0.95) * (tokens - 1024) / (4096 - 1024)
        scheduler.register_to_config(shift_terminal=None)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    else:
        scheduler.set_timesteps(steps)
    tolerance = 0 if isinstance(process, pipelines.VariancePreserving) else 3  # UniPC's grid begins at 999
    torch.testing.assert_close(ours, scheduler.timesteps.double(), rtol=0, atol=tolerance)


def test_a_pair_starts_at_the_samplers_step_of_its_level(path: Callable[[str], Path]) -> None:
    """Both clips are the real one's latents at exactly that step's sigma, under noise of their own."""
    pipeline = pipelines.load(path("wan"))
    maker = Maker(pipeline, MediaSize(32, 32, 9), 20, 1.0, "", 0, (0.3, 0.9))
    inside = [i for i, level in enumerate(maker.noise_levels.tolist()) if 0.3 <= level <= 0.9]
    assert {maker.start(u / 50) for u in range(50)} == set(inside)
    assert maker.start(0) == inside[-1] and maker.start(0.999) == inside[0]
    seen: list[tuple[float, Tensor]] = []

    def watched(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **_: Any) -> Tensor:
        seen.append((float(timesteps[0]) / 1000, noisy))
        return torch.zeros_like(noisy)

    pipeline.predict = watched  # type: ignore[method-assign]
    real = moving_clip(0, 9).float() / 255
    maker._real = lambda media: real  # type: ignore[method-assign]
    _, facts = maker.structural(Group(id="x", prompt="p", candidates=(b"x",), scores=(1.0,), origin="x"))
    per_clip = len(seen) // 2
    assert per_clip == 20 - facts["start"]
    latents = pipeline.encode_pixels(real.unsqueeze(0))
    rng = SampleRNG(0, ["x"], maker.process)
    for side in range(2):
        sigma, noisy = seen[side * per_clip]
        assert sigma == pytest.approx(facts["level"], abs=1e-5)
        noise = rng.normal(f"noise {side}", latents.shape[1:])
        torch.testing.assert_close(noisy, (1 - sigma) * latents + sigma * noise)


def test_sampling_from_a_step_on_removes_its_noise() -> None:
    """A model that knows the clip gives v = noise - x, whose straight path leads from any step back to it."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    process = RectifiedFlow(3.0)
    for start in (0, 5, 9):
        time = process.sampling_times(10)[start : start + 1]
        sampler = Sampler(process=process, steps=10)
        calls: list[float] = []

        def model(noisy: Tensor, t: Tensor, _: Conditioning, calls: list[float] = calls) -> Tensor:
            calls.append(float(t))
            return noise - clean

        noisy = process.add_noise(clean, noise, time)
        out = sampler.sample(model, noisy, {}, {}, without_gradient(10, noisy), SampleRNG(0, ["x"], process), start)
        torch.testing.assert_close(out, clean)
        assert calls == process.sampling_times(10)[start:].tolist()


def test_a_schedule_lies_on_the_cpu_wherever_its_batch_does() -> None:
    """It decides the course of a step, and reading it on a GPU would wait for the GPU."""
    schedule = without_gradient(5, torch.empty(2, 3, device="meta"))
    assert schedule.gradient.device.type == schedule.stop.device.type == "cpu"
    assert schedule.gradient.shape == (5, 2) and schedule.stop.shape == (2,)


def test_a_lower_level_stays_nearer_to_the_real_clip(path: Callable[[str], Path], real: Path, tmp_path: Path) -> None:
    distances = []
    for level in (0.2, 0.9):
        out = tmp_path / str(level)
        options = {**QUIET, "steps": 40, "least_level": level - 0.05, "most_level": level + 0.05}
        pairs(real, out, model=path("wan"), lossless=True, **options)
        clip = load(real / "a.mp4", MediaSize(32, 32, 9, RATE)).pixels
        made = whole_clip(out / rows(out / "pairs.jsonl")["a"]["videos"][0]).float() / 255
        decoded = _through_the_vae(pipelines.load(path("wan")), clip)
        distances.append((made - decoded).square().mean())
    assert distances[0] < distances[1] / 2


def _through_the_vae(pipeline: TrainablePipeline, clip: Tensor) -> Tensor:
    return pipeline.decode_latents(pipeline.encode_pixels(clip.unsqueeze(0)))[0]


def test_independent_pairs_are_samples_of_the_caption(path: Callable[[str], Path], real: Path, tmp_path: Path) -> None:
    pairs(real, tmp_path, model=path("wan"), independent=True, lossless=True, **QUIET)
    row = rows(tmp_path / "pairs.jsonl")["a"]
    options = {"steps": 10, "guidance": 2.0}
    expected = pipelines.load(path("wan")).generate([row["prompt"]] * 2, row["seeds"], **options)  # type: ignore[arg-type]
    for file, clip in zip(row["videos"], expected, strict=True):
        assert (whole_clip(tmp_path / file) - (clip * 255).round()).abs().max() <= 1
    assert json.loads((tmp_path / "pairs.jsonl.settings.json").read_text())["settings"]["kind"] == "independent"


def test_an_interrupted_run_continues_to_the_same_pairs(
    path: Callable[[str], Path], real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pairs(real, whole, model=path("wan"), **QUIET)
    saved: list[str] = []

    def save(clip: Tensor, file: Path, *arguments: Any, **options: Any) -> None:
        saved.append(file.parent.name)
        if len(saved) == 4:  # the second clip of the second pair
            raise KeyboardInterrupt
        save_clip(clip, file, *arguments, **options)

    monkeypatch.setattr(curate, "save_clip", save)
    with pytest.raises(KeyboardInterrupt):
        pairs(real, halves, model=path("wan"), **QUIET)
    assert list(rows(halves / "pairs.jsonl")) == ["a"]
    clip = halves / rows(halves / "pairs.jsonl")["a"]["videos"][1]
    data = clip.read_bytes()
    for content in (b"", data[: len(data) // 2], data[:-1]):
        clip.write_bytes(content)
        with pytest.raises(UserError, match=r"1\.mp4: is listed in pairs\.jsonl, and missing or cut; --force"):
            pairs(real, halves, model=path("wan"), **QUIET)
    clip.write_bytes(data)
    with pytest.raises(UserError, match=r"seed.*choose another"):
        pairs(real, halves, model=path("wan"), seed=1, **QUIET)
    pairs(real, halves, model=path("wan"), **QUIET)
    assert len(saved) == 8 and len({*saved}) == 3
    for row in rows(whole / "pairs.jsonl").values():
        for name in row["videos"]:
            assert (whole / name).read_bytes() == (halves / name).read_bytes()
    assert rows(whole / "pairs.jsonl").keys() == rows(halves / "pairs.jsonl").keys()
    with pytest.raises(UserError, match="exists and is finished"):
        pairs(real, halves, model=path("wan"), **QUIET)


def test_clips_that_cannot_be_used_are_skipped_with_a_reason(
    path: Callable[[str], Path], real: Path, tmp_path: Path
) -> None:
    """Real files: too short, only sound, a tail that is cut off, too slow, no caption, an image, no clip at all."""
    folder, noise = tmp_path / "bad", torch.rand(24, 3, 64, 64)
    folder.mkdir()
    save_clip(moving_clip(0, 17), folder / "good.mp4", RATE)
    save_clip(moving_clip(0, 5), folder / "short.mp4", RATE)
    save_clip(moving_clip(0, 17), folder / "slow.mp4", 8)
    save_clip(moving_clip(0, 17), folder / "silent.mp4", RATE)
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.mp4")
    save_clip(noise, tmp_path / "long.mp4", RATE)
    ffmpeg("-i", tmp_path / "long.mp4", "-movflags", "+faststart", tmp_path / "start.mp4")
    content = (tmp_path / "start.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 4])
    image(0).save(folder / "still.png")
    (folder / "notes.pdf").write_text("no clip")
    for name in ("good", "short", "slow", "sound", "cut", "still"):
        (folder / f"{name}.txt").write_text("a fox")
    summary = pairs(folder, tmp_path / "out", model=path("wan"), **QUIET)
    assert summary.groups == 1 and list(rows(tmp_path / "out" / "pairs.jsonl")) == ["good"]
    reasons = skipped(tmp_path / "out" / "pairs.jsonl")
    for name, expected in {
        "short": "5 frames at 16 a second, expected a clip of 9 frames",
        "slow": "8 frames a second, too few for 16",
        "sound": "no video in it",
        "cut": "frames at 16 a second, expected a clip of 9",
        "still": "expected a clip of 9 frames",
        "silent": "no caption: neither silent.txt beside it or in captions/",
        "notes.pdf": "no image or clip",
    }.items():
        assert expected in reasons[name], (name, reasons[name])
    (folder / "good.mp4").unlink()
    with pytest.raises(UserError, match=r"none of 7 groups could be annotated; .*skipped\.jsonl says why"):
        pairs(folder, tmp_path / "none", model=path("wan"), **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least_level": 0.8, "most_level": 0.6}, "must lie in"),
        ({"most_level": 1.0}, "must lie in"),
        ({"steps": 2, "most_level": 0.7}, r"of 2 steps has a level in \[0.65, 0.7\].* one of 1.00, 0.75"),
        ({"frames": 10}, "frames must be 4k"),
        ({"model": "sd"}, "makes images"),
        ({"fps": 0}, "fps must be a number of frames"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_any_work(
    options: dict[str, Any], message: str, path: Callable[[str], Path], real: Path, tmp_path: Path
) -> None:
    options = {**QUIET, **options}
    with pytest.raises((UserError, pipelines.PipelineError), match=message):
        pairs(real, tmp_path / "out", model=path(options.pop("model", "wan")), **options)
    assert not (tmp_path / "out" / "clips").exists()
