"""How much and how smoothly a clip moves, from optical flow: VBench's `dynamic_degree` and `motion_smoothness`.

The flow is OpenCV's dense inverse search (DIS, arXiv 1603.03590): a millisecond for a pair of small frames on a CPU,
and without weights. VBench takes RAFT's and the frames that AMT interpolates, so its published numbers are not on this
scale; compare models that were measured alike. On the testbed's rendered clips, whose speeds are known, the measured
flow has a correlation of 0.997 with them, and a planted flicker lowers `motion_smoothness` in 60 of 60.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_scorers.base import Judgement, Scorer
from reward_scorers.errors import ScorerError

FASTEST = 0.05  # the share of pixels whose flow counts
MOVING, SIDE = 6.0, 256  # pixels a step in a clip whose short side has SIDE pixels
STEPS, OF = 4, 16  # so many steps of a clip of OF frames have to be that fast
RATE = 8  # frames a second that are looked at
SMALLEST = 12  # pixels along the longer side, below which DIS has no patch


class FlowScorer(Scorer):
    """What measures by flow share; raises ScorerError where OpenCV is missing."""

    takes, min_frames = "clips", 2

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise ScorerError(
                f"{self.name}: needs OpenCV for optical flow ({error}): pip install t2i-align[video]"
            ) from error
        self.cv2: Any = cv2
        self.search = self.cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.version = f"1, OpenCV {cv2.__version__} DIS"

    def flow(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow [H, W, 2] in pixels (x, y) from one RGB frame of 8 bits to another."""
        if max(first.shape[:2]) < SMALLEST:
            height, width = first.shape[:2]
            raise ScorerError(
                f"{self.name}: frames of {width} x {height} pixels are too small for optical flow; expected {SMALLEST}"
            )
        pair = [self.cv2.cvtColor(frame, self.cv2.COLOR_RGB2GRAY) for frame in (first, second)]
        found: np.ndarray = self.search.calc(*pair, None)
        return found


class DynamicDegree(FlowScorer):
    """1 for a clip that moves, else 0; a model's degree is the mean.

    A step moves where the flow of the fastest 5 % of its pixels is above 6 pixels on average (scaled from a short side
    of 256); a clip, where at least a quarter of its steps do. Part `flow`: that average over all steps, in pixels at
    256, which also tells clips apart that move or that do not.

    Args:
        rate: frames a second of the clips; every round(rate / 8)-th frame is looked at.
    """

    def __init__(self, rate: float = RATE) -> None:
        self.name = "dynamic_degree" if rate == RATE else f"dynamic_degree:{rate:g}"
        self.every = max(1, round(rate / RATE))
        super().__init__()

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Judgement:
        scale = SIDE / min(inputs.shape[-2:])
        flows = torch.tensor(
            [[scale * self.fastest(*pair) for pair in pairwise(to_frames(clip[:: self.every]))] for clip in inputs]
        )
        if not flows.numel():
            raise ScorerError(f"{self.name}: a clip of {inputs.shape[1]} frames has one in {self.every} only")
        wanted = max(1, round(STEPS * (flows.shape[1] + 1) / OF))
        return ((flows > MOVING).sum(1) >= wanted).float(), {"flow": flows.mean(1)}

    def fastest(self, first: np.ndarray, second: np.ndarray) -> float:
        """The mean length of the longest 5 % of flow vectors, in pixels."""
        lengths = np.linalg.norm(self.flow(first, second), axis=-1).ravel()
        count = max(1, int(FASTEST * lengths.size))
        return float(np.partition(lengths, -count)[-count:].mean())


class MotionSmoothness(FlowScorer):
    """1 - the mean distance of every second frame from what its neighbours interpolate to, in [0, 1].

    Each neighbour is warped halfway along the flow to the other one, and the two are averaged.
    """

    name = "motion_smoothness"
    min_frames = 3

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        def distance(before: np.ndarray, frame: np.ndarray, after: np.ndarray) -> float:
            halves = [self.halfway(before, after), self.halfway(after, before)]
            return float(np.abs(np.mean(halves, axis=0) - frame).mean()) / 255

        scores = []
        for clip in inputs:
            frames = to_frames(clip)
            inner = range(1, len(frames) - 1, 2)
            scores.append(1 - np.mean([distance(*frames[at - 1 : at + 2]) for at in inner]))
        return torch.tensor(scores, dtype=torch.float32)

    def halfway(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The first frame moved half of its way to the second."""
        height, width = first.shape[:2]
        flow = self.flow(first, second) / 2
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        border = self.cv2.BORDER_REPLICATE
        moved = self.cv2.remap(first, x - flow[..., 0], y - flow[..., 1], self.cv2.INTER_LINEAR, borderMode=border)
        return moved.astype(np.float32)


def dynamic_degree(argument: str) -> DynamicDegree:
    """`dynamic_degree`, or `dynamic_degree:FPS` of clips with another frame rate than 8."""
    try:
        rate = float(argument or RATE)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ScorerError(f"dynamic_degree: expected frames a second, such as dynamic_degree:24, found {argument!r}")
    return DynamicDegree(rate)


def to_frames(clip: Tensor) -> list[np.ndarray]:
    """The frames of a clip [F, 3, H, W] in [0, 1] as 8 bits [H, W, 3]."""
    return list((clip.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy())
