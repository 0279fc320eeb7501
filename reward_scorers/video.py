"""What a clip does over time, whatever it shows: how much moves, how smoothly, and whether things stay themselves.

Whole clips only; every other scorer gives a clip the mean over its frames. None of these three knows the prompt. A
still image repeated is perfectly smooth and consistent, so read them together with `motion`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from reward_scorers.base import Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.registry import build
from reward_scorers.towers import TwoTowers


class Motion(Scorer):
    """Mean absolute change of a pixel from frame to frame, in [0, 1]; 1 minus it is VBench's flicker measure."""

    name, version = "motion", "1"
    differentiable = True
    takes, min_frames = "clips", 2

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return inputs.diff(dim=1).abs().flatten(1).mean(1)


class Smoothness(Scorer):
    """1 - the mean distance of a frame from the middle of its neighbours, in [0, 1]; 1 is motion at constant change."""

    name, version = "smoothness", "1"
    differentiable = True
    takes, min_frames = "clips", 3

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        middle = (inputs[:, :-2] + inputs[:, 2:]) / 2
        return 1 - (inputs[:, 1:-1] - middle).abs().flatten(1).mean(1)


class Consistency(Scorer):
    """mean over t of (cos(f_t, f_1) + cos(f_t, f_{t-1})) / 2 of frames' features (VBench, arXiv 2311.17982).

    Args:
        towers: their image features; VBench takes CLIP's for the background, DINO's for the subject.
    """

    differentiable = True
    takes, min_frames = "clips", 2

    def __init__(self, towers: TwoTowers) -> None:
        self.towers, self.preprocess = towers, towers.preprocess
        self.name, self.version = f"consistency:{towers.name}", f"1, {towers.version}"

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        features = self.towers.encode_images(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        to_first = (features[:, 1:] * features[:, :1]).sum(-1)
        to_previous = (features[:, 1:] * features[:, :-1]).sum(-1)
        return ((to_first + to_previous) / 2).mean(1)


def consistency(argument: str) -> Consistency:
    """`consistency:SPEC` of a CLIP-style scorer, such as `consistency:clip:ViT-B-32:laion400m_e32`."""
    towers = build(argument or "clip")
    if not isinstance(towers, TwoTowers):
        raise ScorerError(f"consistency: needs a CLIP-style scorer's features, found {towers.name}")
    return Consistency(towers)
