"""What a clip does over time, whatever it shows: how much moves, how smoothly, and whether things stay themselves.

Clips [B, F, 3, H, W] only; every other scorer gives a clip the mean over its frames. None of these three knows the
prompt. A still image repeated is perfectly smooth and consistent, so read them together with `motion`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from reward_scorers.base import Judgement, Scorer, ScorerError
from reward_scorers.registry import build, register
from reward_scorers.towers import TwoTowers


class ClipMeasure(Scorer):
    """A measure of at least `frames` frames; a subclass fills in `_measure`."""

    version = "1"
    differentiable = True
    frames = 2

    @abstractmethod
    def _measure(self, clips: Tensor) -> Tensor:
        """The measure [B] of clips [B, F, 3, H, W]."""

    def _score_media(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if pixels.ndim != 5 or pixels.shape[1] < self.frames:
            found = list(pixels.shape)
            raise ScorerError(f"{self.name}: expected clips [B, F, 3, H, W] of {self.frames} frames or more: {found}")
        return self._measure(pixels.float())

    def _judge_media(self, pixels: Tensor, prompts: Sequence[str]) -> Judgement:
        return self._score_media(pixels, prompts), {}

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score_media(pixels, prompts)

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        raise ScorerError(f"{self.name}: judges clips, found single images")


class Motion(ClipMeasure):
    """Mean absolute change of a pixel from frame to frame, in [0, 1]; 1 minus it is VBench's flicker measure."""

    name = "motion"

    def _measure(self, clips: Tensor) -> Tensor:
        return clips.diff(dim=1).abs().flatten(1).mean(1)


class Smoothness(ClipMeasure):
    """1 - the mean distance of a frame from the middle of its neighbours, in [0, 1]; 1 is motion at constant change."""

    name = "smoothness"
    frames = 3

    def _measure(self, clips: Tensor) -> Tensor:
        middle = (clips[:, :-2] + clips[:, 2:]) / 2
        return 1 - (clips[:, 1:-1] - middle).abs().flatten(1).mean(1)


class Consistency(ClipMeasure):
    """mean over t of (cos(f_t, f_1) + cos(f_t, f_{t-1})) / 2 of frames' features (VBench, arXiv 2311.17982).

    Args:
        towers: whose image features; VBench takes CLIP's for the background, DINO's for the subject.
    """

    def __init__(self, towers: TwoTowers) -> None:
        self.towers = towers
        self.name = f"consistency:{towers.name}"
        self.version = f"1, {towers.version}"

    def to(self, device: torch.device | str) -> Consistency:
        """Move the network. Returns itself."""
        self.towers.to(device)
        return self

    def _measure(self, clips: Tensor) -> Tensor:
        frames = self.towers.preprocess(clips.flatten(0, 1).to(self.towers.device))
        features = self.towers.encode_images(frames).unflatten(0, clips.shape[:2])
        to_first = (features[:, 1:] * features[:, :1]).sum(-1)
        to_last = (features[:, 1:] * features[:, :-1]).sum(-1)
        return ((to_first + to_last) / 2).mean(1)


@register("motion")
def motion(argument: str) -> Motion:
    """`motion`."""
    _no_argument("motion", argument)
    return Motion()


@register("smoothness")
def smoothness(argument: str) -> Smoothness:
    """`smoothness`."""
    _no_argument("smoothness", argument)
    return Smoothness()


@register("consistency")
def consistency(argument: str) -> Consistency:
    """`consistency:SPEC` of a CLIP-style scorer, such as `consistency:clip:ViT-B-32:laion400m_e32`."""
    towers = build(argument or "clip")
    if not isinstance(towers, TwoTowers):
        raise ScorerError(f"consistency: needs a CLIP-style scorer's features, found {towers.name}")
    return Consistency(towers)


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise ScorerError(f"{name}: takes no argument, found {argument!r}")
