"""Measures of clips, by hand; and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import reward_scorers
from reward_scorers import ScorerError
from reward_scorers.towers import TwoTowers
from reward_scorers.video import Consistency


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


def test_motion_and_smoothness_by_hand() -> None:
    """Steps of 0.2 move by 0.2 and are smooth; 0.0, 0.6, 0.2 moves by (0.6 + 0.4) / 2 and is 0.5 off its middle 0.1."""
    motion, smoothness = reward_scorers.build("motion"), reward_scorers.build("smoothness")
    assert motion.score(clip(0.0, 0.2, 0.4), ["x"]).item() == pytest.approx(0.2)
    assert smoothness.score(clip(0.0, 0.2, 0.4), ["x"]).item() == pytest.approx(1.0)
    assert motion.score(clip(0.0, 0.6, 0.2), ["x"]).item() == pytest.approx(0.5)
    assert smoothness.score(clip(0.0, 0.6, 0.2), ["x"]).item() == pytest.approx(0.5)
    assert motion.score(clip(0.3, 0.3), ["x"]).item() == 0


def test_consistency_by_hand() -> None:
    """Red, red, green: frame 2 is like both, frame 3 like neither; the mean of 1 and 0 is ½, whatever the prompt.

    The towers themselves score 100 cos: of frames that are 2/3 red and 1/3 green, 66.7 and 33.3.
    """
    frames = torch.zeros(1, 3, 3, 4, 4)
    frames[0, :2, 0], frames[0, 2, 1] = 1, 1
    for prompt, cosine in (("red", 2 / 3), ("green", 1 / 3), ("blue", 0)):
        assert Consistency(Colours()).score(frames, [prompt]).item() == pytest.approx(0.5)
        assert Colours().score(frames, [prompt]).item() == pytest.approx(100 * cosine)


def test_gradients_reach_the_frames() -> None:
    frames = torch.rand(2, 4, 3, 8, 8, requires_grad=True)
    for scorer in (reward_scorers.build("motion"), reward_scorers.build("smoothness"), Consistency(Colours())):
        (gradient,) = torch.autograd.grad(scorer.score(frames, ["a", "b"]).sum(), frames)
        assert gradient.abs().sum() > 0, scorer.name


def test_images_and_short_clips_are_refused() -> None:
    motion, found = reward_scorers.build("motion"), r"\[B, F, 3, H, W\] of 2 frames or more, found \[2, 3, 4, 4\]"
    with pytest.raises(ScorerError, match=f"motion: expected clips {found}"):
        motion.score(torch.rand(2, 3, 4, 4), ["a", "b"])
    with pytest.raises(ScorerError, match="of 3 frames or more"):
        reward_scorers.build("smoothness").judge(clip(0.1, 0.2), ["a"])
    with pytest.raises(ScorerError, match="judges clips, found single images"):
        motion.score_images([Image.new("RGB", (4, 4))], ["a"])
    with pytest.raises(ScorerError, match="takes no argument, found '3'"):
        reward_scorers.build("motion:3")
