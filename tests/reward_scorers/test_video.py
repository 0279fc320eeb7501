"""Measures of clips, by hand and on clips whose motion is known; frames in batches; and what they refuse."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import reward_scorers
from reward_scorers import ScorerError
from reward_scorers.base import FRAME_BATCH
from reward_scorers.towers import TwoTowers
from reward_scorers.video import Consistency, Frames, OverallConsistency, VisionTower


class Colours(TwoTowers):
    """Features are an image's mean colour, and the colour that a prompt names."""

    name = "colours"
    version = "1"

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)

    def encode_images(self, inputs: Tensor) -> Tensor:
        return F.normalize(inputs.mean((2, 3)), dim=-1)

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        return torch.eye(3)[[["red", "green", "blue"].index(prompt) for prompt in prompts]]


def clip(*values: float) -> Tensor:
    """One grey clip with these brightnesses."""
    return torch.tensor(values).view(1, -1, 1, 1, 1).expand(1, len(values), 3, 4, 4)


def moving(step: float, frames: int = 9, side: int = 64, jump: int | None = None) -> Tensor:
    """A textured disc that goes `step` pixels a frame to the right, in clips [1, F, 3, H, W]; at `jump` it is aside."""
    y, x = np.mgrid[:side, :side]
    drawn = []
    for t in range(frames):
        left, top = x - 14 - step * t, y - side / 2 - (20 if t == jump else 0)
        inside = np.clip(10 - np.hypot(left, top), 0, 1)
        drawn.append(0.9 - inside * (0.5 + 0.3 * np.sin(left) * np.cos(top)))
    return torch.tensor(np.array(drawn), dtype=torch.float32).clamp(0, 1)[None, :, None].expand(-1, -1, 3, -1, -1)


def test_flickering_by_hand() -> None:
    """Steps of 0.2 leave 1 - 0.2; 0.0, 0.6, 0.2 leaves 1 - (0.6 + 0.4) / 2."""
    flickering = reward_scorers.build("temporal_flickering")
    assert flickering.score(clip(0.0, 0.2, 0.4), ["x"]).item() == pytest.approx(0.8)
    assert flickering.score(clip(0.0, 0.6, 0.2), ["x"]).item() == pytest.approx(0.5)
    assert flickering.score(clip(0.3, 0.3), ["x"]).item() == 1


def colours(*channels: int) -> Tensor:
    """A clip of frames in one pure colour each, by channel."""
    frames = torch.zeros(1, len(channels), 3, 4, 4)
    for t, channel in enumerate(channels):
        frames[0, t, channel] = 1
    return frames


def test_consistency_by_hand() -> None:
    """Red, red, green: frame 2 is like both, frame 3 like neither; the mean of 1 and 0 is ½, whatever the prompt.

    The towers themselves score 100 cos: of frames that are 2/3 red and 1/3 green, 66.7 and 33.3. The mean feature
    (2, 1, 0) / 3 has a cosine of 2/√5 with red and 1/√5 with green.
    """
    towers, frames = Colours(), colours(0, 0, 1)
    for prompt, cosine, overall in (("red", 2 / 3, 2 / 5**0.5), ("green", 1 / 3, 1 / 5**0.5), ("blue", 0, 0)):
        consistency = Consistency("background_consistency", towers)
        assert consistency.score(frames, [prompt]).item() == pytest.approx(0.5)
        assert towers.score(frames, [prompt]).item() == pytest.approx(100 * cosine)
        total, parts = OverallConsistency(towers).judge(frames, [prompt])
        assert total.item() == pytest.approx(overall)
        assert (parts["frame"].item(), parts["worst_frame"].item()) == pytest.approx((cosine, 0))
    assert consistency.name == "background_consistency:colours"
    opposite = Consistency("x", Opposite()).score(clip(0.0, 1.0), ["x"])  # features 1 and -1: cut at 0
    assert opposite.item() == 0


class Opposite(Colours):
    """A feature that is 1 for black and -1 for white."""

    def encode_images(self, inputs: Tensor) -> Tensor:
        return 1 - 2 * inputs.mean((1, 2, 3))[:, None]


def test_scores_of_frames_and_of_some_frames() -> None:
    """Two of six frames are those in the middle of either half, the second and the fifth."""
    towers, frames = Colours(), colours(0, 1, 0, 0, 2, 0)
    assert towers.frame_scores(frames, ["red"]).tolist() == [[100, 0, 100, 100, 0, 100]]
    for count, prompt, score in ((2, "red", 0), (2, "blue", 50), (99, "green", 100 / 6)):
        assert Frames(count, towers).score(frames, [prompt]).item() == pytest.approx(score)
    some = Frames(2, OverallConsistency(towers))
    assert some.name == "frames:2:overall_consistency:colours" and some.differentiable
    assert some.score(frames, ["blue"]).item() == pytest.approx(0.5**0.5)
    assert Frames(2, towers).score(frames[:, 0], ["red"]).item() == 100
    flicker = reward_scorers.build("temporal_flickering")
    with pytest.raises(ScorerError, match=r"a scorer of images; temporal_flickering judges whole clips"):
        flicker.frame_scores(frames, ["red"])
    with pytest.raises(ScorerError, match=r"found \[1, 3, 4, 4\]"):
        towers.frame_scores(frames[:, 0], ["red"])
    with pytest.raises(ScorerError, match="expected frames:COUNT:SCORER, such as frames:8:pickscore, found '0:clip'"):
        reward_scorers.build("frames:0:clip")


def test_frames_go_through_a_network_in_batches() -> None:
    """Two clips of 40 frames: never more than 32 frames at once, and the scores of each frame alone."""
    sizes: list[int] = []

    class Watched(Colours):
        def encode_images(self, inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            return super().encode_images(inputs)

    clips, prompts = torch.rand(2, 40, 3, 4, 4), ["red", "blue"]
    watched = Watched()
    scores = watched.frame_scores(clips, prompts)
    alone = [Colours().score(frame[None], [prompt]) for c, prompt in zip(clips, prompts, strict=True) for frame in c]
    torch.testing.assert_close(scores.flatten(), torch.cat(alone))
    torch.testing.assert_close(watched.score(clips, prompts), scores.mean(1))
    Consistency("x", watched).score(clips, prompts)
    assert max(sizes) == FRAME_BATCH and sum(sizes) == 3 * 80


def test_a_vision_tower_is_the_vit_itself(tmp_path: Path) -> None:
    """[CLS] of the normalised frames, for the size of the model and for another aspect."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    vit = ViTModel(config, add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    scorer = reward_scorers.build(f"subject_consistency:{tmp_path}")
    assert isinstance(scorer, Consistency) and isinstance(scorer.features, VisionTower)
    for height, width in ((32, 32), (32, 48)):
        frames = torch.rand(1, 2, 3, height, width)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            found = vit((frames[0] - mean) / std, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        expected = F.cosine_similarity(found[:1], found[1:]).clamp(min=0)
        torch.testing.assert_close(scorer.score(frames, ["x"]), expected)
    with pytest.raises(ScorerError, match="no such folder"):
        reward_scorers.build("subject_consistency:/nowhere")


def test_dynamic_degree_of_known_motion() -> None:
    """The threshold is 6 pixels at 256, 1.5 at 64; the disc covers 7.7 % of the frame, so its speed is the flow's."""
    degree = reward_scorers.build("dynamic_degree")
    for step, moves in ((0.0, 0.0), (0.8, 0.0), (3.0, 1.0)):
        total, parts = degree.judge(moving(step), ["x"])
        assert total.item() == moves
        assert parts["flow"].item() == pytest.approx(4 * step, rel=0.1, abs=0.05)
    # Of 24 frames a second every third is looked at: a step of 0.8 becomes one of 2.4.
    assert reward_scorers.build("dynamic_degree:24").score(moving(0.8, frames=25), ["x"]).item() == 1
    # A quarter of the steps has to be fast: of 17 frames, 4.
    for fast, moves in ((3, 0.0), (4, 1.0)):
        still, quick = moving(0.0, frames=16 - fast), moving(3.0, frames=fast + 1)
        assert degree.score(torch.cat([still, quick], 1), ["x"]).item() == moves
    with pytest.raises(ScorerError, match="a clip of 2 frames has one in 3 only"):
        reward_scorers.build("dynamic_degree:24").score(moving(0.0, frames=2), ["x"])
    with pytest.raises(ScorerError, match="such as dynamic_degree:24, found 'fast'"):
        reward_scorers.build("dynamic_degree:fast")


def test_smooth_motion_is_smooth_however_fast() -> None:
    """A jump of one frame costs more than going twice as fast; that is what pixels alone would not tell."""
    smoothness = reward_scorers.build("motion_smoothness")
    still, slow, quick = (smoothness.score(moving(step), ["x"]).item() for step in (0.0, 1.5, 3.0))
    jumping = smoothness.score(moving(1.5, jump=3), ["x"]).item()
    assert still == pytest.approx(1, abs=1e-3)
    assert min(slow, quick) > 0.99 > jumping + 0.005
    with pytest.raises(ScorerError, match="motion_smoothness: frames of 4 x 4 pixels are too small for optical flow"):
        smoothness.score(clip(0.0, 0.6, 0.2), ["x"])


def test_without_opencv_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ScorerError, match=r"dynamic_degree: needs OpenCV .*: pip install t2i-align\[video\]"):
        reward_scorers.build("dynamic_degree")


def test_gradients_reach_the_frames() -> None:
    frames = torch.rand(2, 4, 3, 8, 8, requires_grad=True)
    towers = Colours()
    measures = [Consistency("x", towers), OverallConsistency(towers), Frames(2, towers)]
    for scorer in (reward_scorers.build("temporal_flickering"), *measures):
        (gradient,) = torch.autograd.grad(scorer.score(frames, ["red", "blue"]).sum(), frames)
        assert gradient.abs().sum() > 0, scorer.name


def test_images_and_short_clips_are_refused() -> None:
    flickering, found = reward_scorers.build("temporal_flickering"), r"of 2 frames or more, found \[2, 3, 4, 4\]"
    with pytest.raises(ScorerError, match=rf"temporal_flickering: expected clips \[B, F, 3, H, W\] {found}"):
        flickering.score(torch.rand(2, 3, 4, 4), ["a", "b"])
    with pytest.raises(ScorerError, match="of 3 frames or more"):
        reward_scorers.build("motion_smoothness").judge(clip(0.1, 0.2), ["a"])
    with pytest.raises(ScorerError, match="judges clips, found single images"):
        flickering.score_images([Image.new("RGB", (4, 4))], ["a"])
    with pytest.raises(ScorerError, match="takes no argument, found '3'"):
        reward_scorers.build("temporal_flickering:3")
    with pytest.raises(ScorerError, match="background_consistency: needs a CLIP-style scorer's features, found temp"):
        reward_scorers.build("background_consistency:temporal_flickering")
