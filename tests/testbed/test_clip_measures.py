"""Measures of clips on rendered ones, of which speed and faults are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import reward_scorers
from t2i_align.testbed.clips import Clip, sample_clip
from tools.testbed.faults import spoil, to_clip


def rendered(frames: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 1, 4, 2, 3).float() / 255


def speed(clip: Clip) -> float:
    return float(np.hypot(*np.diff(np.array(clip.movers[0].track), axis=0).T).mean())


def test_flow_is_the_speed_that_clips_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    clips = [sample_clip(rng) for _ in range(60)]
    pixels = rendered([to_clip(clip.scenes, rng) for clip in clips])
    moving, parts = reward_scorers.build("dynamic_degree").judge(pixels, ["x"] * len(clips))
    speeds = np.array([speed(clip) for clip in clips])
    assert np.corrcoef(parts["flow"].numpy(), speeds)[0, 1] > 0.99
    assert not moving[speeds == 0].any() and moving[speeds > 3].all()


def test_a_planted_flicker_is_no_smooth_motion() -> None:
    rng = np.random.default_rng(1)
    clips = [clip for clip in (sample_clip(rng) for _ in range(24)) if clip.movers[0].speed]
    smoothness, prompts = reward_scorers.build("motion_smoothness"), ["x"] * len(clips)
    clean = rendered([to_clip(clip.scenes, rng) for clip in clips])
    faulty = rendered([to_clip(spoil(clip, rng, "flicker")[0], rng) for clip in clips])
    assert (smoothness.score(faulty, prompts) < smoothness.score(clean, prompts)).all()
