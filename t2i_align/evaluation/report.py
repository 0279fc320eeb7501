"""The HTML report of a comparison: one file with the images or clips inside, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from t2i_align.data.media import save_clip
from t2i_align.inference.generate import Sample
from t2i_align.utils.html import ENVIRONMENT, PIXELATED_BELOW

SHOWN_SIDE = 384  # pixels; larger images are shrunk so that a report stays a file one can mail
SHOWN_CLIP_SIDE, SHOWN_FRAMES = 256, 32  # of clips; longer ones leave out every so many frames


def keep(sample: Sample, store: Path, side: str, row: int, fps: float) -> None:
    """Keep what the report may show of a side's image or clip ("base" or "aligned") until it is written."""
    name = store / f"{side}-{row:06d}"
    if isinstance(sample, Tensor):
        every = math.ceil(len(sample) / SHOWN_FRAMES)
        enlarged = max(sample.shape[-2:]) < PIXELATED_BELOW  # before a codec that halves the resolution of colours
        kind = InterpolationMode.NEAREST if enlarged else InterpolationMode.BILINEAR
        small = resize(sample[::every], [*_clip_size(*sample.shape[-2:])], kind, antialias=not enlarged)
        save_clip(small, name.with_suffix(".mp4"), fps / every)
    else:
        small = sample.copy()
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        small.save(name.with_suffix(".png"), optimize=True)


def render(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], store: Path, images: int) -> str:
    """The report as HTML text.

    Args:
        result: what `result.json` holds.
        samples: what `pairs.jsonl` holds, one per pair.
        store: folder with what `keep` wrote of both sides.
        images: pairs to show: half drawn at random (by the evaluation's seed), a quarter each of the largest wins
            and losses of the first scorer.
    """
    return ENVIRONMENT.get_template("evaluation/report.html.jinja").render(
        result=result,
        samples=samples,
        chosen=choose(samples, result["scorer"], images, result["seed"]),
        verdict=verdict,
        media=lambda side, row: _inline(store, f"{side}-{row:06d}", result),
    )


def _clip_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a clip is kept: even, as videos want it, and tiny ones enlarged by a whole number."""
    longer = max(height, width)
    scale = SHOWN_CLIP_SIDE // longer if longer < PIXELATED_BELOW else min(1.0, SHOWN_CLIP_SIDE / longer)
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def choose(samples: Sequence[Mapping[str, Any]], scorer: str, images: int, seed: int) -> dict[str, list[int]]:
    """Which pairs are shown: a random sample without looking at scores, then the extremes among wins and losses."""
    count = min(images - 2 * (images // 4), len(samples))
    drawn = np.random.default_rng(abs(seed)).choice(len(samples), size=count, replace=False)
    change = {
        row: sample["scores"][scorer]["after"] - sample["scores"][scorer]["before"]
        for row, sample in enumerate(samples)
        if sample["scores"][scorer]["outcome"] in ("win", "loss")
    }
    ranked = sorted(change, key=lambda row: change[row])
    best = [row for row in reversed(ranked) if change[row] > 0][: images // 4]
    worst = [row for row in ranked if change[row] < 0][: images // 4]
    return {"random": sorted(int(row) for row in drawn), "wins": best, "losses": worst}


def verdict(interval: Sequence[float | None]) -> str:
    """ "better" or "worse" if the interval lies on one side of a half, else "open"."""
    low, high = interval
    if low is None or high is None:
        return "open"
    return "better" if low > 0.5 else "worse" if high < 0.5 else "open"


def _inline(store: Path, name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """An image or a video as a data URI with its size."""
    file = next(store.glob(f"{name}.*"))
    video = file.suffix == ".mp4"
    if video:
        height, width = _clip_size(result["height"], result["width"])
    else:
        with Image.open(file) as image:
            width, height = image.size
    kind = f"{'video' if video else 'image'}/{file.suffix[1:]}"
    return {
        "uri": f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}",
        "video": video,
        "width": width,
        "height": height,
        "pixelated": max(width, height) < PIXELATED_BELOW,
    }
