"""Measures of clips under VBench's names (arXiv 2311.17982), and image scorers on some of a clip's frames.

A measure takes whole clips; every other scorer gives a clip the mean over its frames. Only `overall_consistency` knows
the prompt. A still image repeated never flickers and is perfectly consistent, so read these together with
`dynamic_degree` (`reward_scorers.flow`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision import transforms as T

from reward_scorers.base import FRAME_BATCH, Judgement, Media, Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.registry import build
from reward_scorers.towers import Preprocess, TwoTowers, unit
from reward_scorers.weights import identity, load_pretrained

CLIP = "clip:ViT-B-32-quickgelu:openai"  # VBench's for backgrounds
DINO = "facebook/dino-vitb16"  # its for subjects
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TemporalFlickering(Scorer):
    """1 - the mean absolute change of a pixel from frame to frame, in [0, 1]; VBench takes it of still scenes."""

    name, version = "temporal_flickering", "1"
    differentiable = True
    takes, min_frames = "clips", 2

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return 1 - inputs.diff(dim=1).abs().flatten(1).mean(1)


class Features(Protocol):
    """What gives an image its features: `TwoTowers` of CLIP, or `VisionTower`."""

    name: str
    version: str
    model: Any

    @property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """As of `Scorer`."""

    def encode_images(self, inputs: Tensor) -> Tensor:
        """Unit features [B, D]."""


class VisionTower:
    """The [CLS] token of a ViT of transformers, such as DINO's; images of any aspect, the short side resized.

    Args:
        path: folder or Hub id.

    Raises:
        ScorerError: no such model, not a ViT, or weights missing.
    """

    def __init__(self, path: str) -> None:
        from transformers import ViTModel

        where = f"subject_consistency:{path}"
        self.model: nn.Module = load_pretrained(
            ViTModel.from_pretrained, path, where, kind="vit", strict=False, add_pooling_layer=False, dtype="float32"
        )
        self.name, self.version = path, identity(self.model)
        resize = T.Resize(self.model.config.image_size, antialias=False)  # as VBench does
        self.preprocess = Preprocess(resize, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def encode_images(self, inputs: Tensor) -> Tensor:
        return unit(self.model(inputs, interpolate_pos_encoding=True).last_hidden_state[:, 0])


class Consistency(Scorer):
    """mean over t ≥ 2 of (cos⁺(f_t, f_1) + cos⁺(f_t, f_{t-1})) / 2 of frames' features, cos⁺ = max(cos, 0).

    Args:
        measure: its name: `background_consistency` with CLIP's features, `subject_consistency` with DINO's.
    """

    differentiable = True
    takes, min_frames = "clips", 2

    def __init__(self, measure: str, features: Features) -> None:
        self.features, self.model, self.preprocess = features, features.model, features.preprocess
        self.name, self.version = f"{measure}:{features.name}", f"1, {features.version}"

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        found = encoded(self.features, inputs)
        to_first = (found[:, 1:] * found[:, :1]).sum(-1).clamp(min=0)
        to_previous = (found[:, 1:] * found[:, :-1]).sum(-1).clamp(min=0)
        return ((to_first + to_previous) / 2).mean(1)


class OverallConsistency(Scorer):
    """cos(mean of the frames' features, text's): faithfulness to the prompt. VBench takes it with ViCLIP, of 8 frames.

    Parts: `frame`, the mean over frames of cos(frame, text), and `worst_frame`, the least of them.
    """

    differentiable = True
    takes = "clips"

    def __init__(self, towers: TwoTowers) -> None:
        self.towers, self.preprocess = towers, towers.preprocess
        self.name, self.version = f"overall_consistency:{towers.name}", f"1, {towers.version}"
        self.token_limit = towers.token_limit

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        return self.towers.is_cut(prompts)

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Judgement:
        found, texts = encoded(self.towers, inputs), self.towers.text_features(prompts)
        frames = (found * texts[:, None]).sum(-1)
        overall = (unit(found.mean(1)) * texts).sum(-1)
        return overall, {"frame": frames.mean(1), "worst_frame": frames.amin(1)}


class Frames(Scorer):
    """Another scorer on some frames of a clip, the middles of equal parts (`frames:8:SPEC`); images stay as they are.

    Args:
        count: how many frames; a shorter clip keeps all of its own.
    """

    takes = "media"

    def __init__(self, count: int, scorer: Scorer) -> None:
        self.count, self.scorer = count, scorer
        self.name, self.version = f"frames:{count}:{scorer.name}", scorer.version
        self.differentiable, self.tie_margin = scorer.differentiable, scorer.tie_margin

    @property
    def cut(self) -> set[str]:
        """Of the scorer."""
        return self.scorer.cut

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.scorer.check_prompts(prompts)

    def rate(self, inputs: Media, prompts: Sequence[str]) -> Judgement:
        if isinstance(inputs, Tensor) and inputs.ndim == 5:
            inputs = inputs[:, middles(inputs.shape[1], self.count)]
        return self.scorer.judge(inputs, prompts)


def middles(frames: int, count: int) -> list[int]:
    """The middle frames of `count` equal parts of a clip of `frames`; all frames where these are fewer."""
    count = min(count, frames)
    return [(2 * part + 1) * frames // (2 * count) for part in range(count)]


def encoded(features: Features, inputs: Tensor) -> Tensor:
    """Unit features [B, F, D] of frames [B, F, C, h, w], `FRAME_BATCH` at a time."""
    parts = [features.encode_images(part) for part in inputs.flatten(0, 1).split(FRAME_BATCH)]
    return torch.cat(parts).unflatten(0, inputs.shape[:2])


def background_consistency(argument: str) -> Consistency:
    """`background_consistency`, or `background_consistency:SPEC` of a CLIP-style scorer."""
    return Consistency("background_consistency", _towers("background_consistency", argument))


def subject_consistency(argument: str) -> Consistency:
    """`subject_consistency`, or `subject_consistency:FOLDER` or `:owner/name` of a ViT."""
    return Consistency("subject_consistency", VisionTower(argument or DINO))


def overall_consistency(argument: str) -> OverallConsistency:
    """`overall_consistency`, or `overall_consistency:SPEC` of a CLIP-style scorer."""
    return OverallConsistency(_towers("overall_consistency", argument))


def frames(argument: str) -> Frames:
    """`frames:COUNT:SPEC`."""
    count, _, spec = argument.partition(":")
    if not (count.isdecimal() and int(count) and spec):
        raise ScorerError(f"frames: expected frames:COUNT:SCORER, such as frames:8:pickscore, found {argument!r}")
    return Frames(int(count), build(spec))


def _towers(measure: str, spec: str) -> TwoTowers:
    towers = build(spec or CLIP)
    if not isinstance(towers, TwoTowers):
        raise ScorerError(f"{measure}: needs a CLIP-style scorer's features, found {towers.name}")
    return towers
