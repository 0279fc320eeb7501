"""Sample a base on the prompts of a split and judge the samples by the oracle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import pipelines
from t2i_align.testbed.oracle import Verdict
from t2i_align.testbed.world import CLIPS, IMAGES, SPLITS, prompts
from tools.testbed.sampling import GUIDANCE, STEPS, model_folder, sample


def means(verdict: Verdict) -> dict[str, float]:
    """Mean of the reward and of each of its parts, attributes over prompts that state them."""
    stated = {"reward": verdict.reward, **verdict.columns()}
    return {name: float(np.nanmean(values)) for name, values in stated.items() if not np.isnan(values).all()}


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images [B, 3, H, W] in [0, 1] side by side; an incomplete last row is left out."""
    rows = len(images) // columns
    height, width = images.shape[-2:]
    tiles = images[: rows * columns].reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    array = (tiles.reshape(rows * height, columns * width, 3) * 255).round().byte().numpy()
    return Image.fromarray(array)


def evaluate(
    family: Any,
    captions: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    image: Path | None = None,
) -> Verdict:
    """Judge one sample per caption, with seeds seed, seed + 1, ...; `image` saves a grid of them, two clips a row."""
    samples = sample(family, captions, range(seed, seed + len(captions)), steps=steps, guidance=guidance)
    if image is not None and len(samples) >= 16:
        grid(samples.flatten(0, -4), 2 * samples.shape[1] if family.video else 16).save(image)
    return (CLIPS if family.video else IMAGES).oracle().judge(samples, captions)


def report_on(pipeline: DiffusionPipeline, step: int, number: int, image: Path) -> None:
    """Print the means over the first dev prompts at a checkpoint, on one line."""
    family = pipelines.wrap(pipeline)
    captions = prompts("video-dev" if family.video else "dev")[:number]
    values = means(evaluate(family, captions, image=image))
    print(f"dev at step {step}:", " ".join(f"{name} {value:.3f}" for name, value in values.items()), flush=True)


def options(p: argparse.ArgumentParser, video: bool) -> None:
    p.add_argument("model", type=model_folder, help="folder of a diffusers pipeline, testbed:sd or another base")
    p.add_argument("--split", choices=SPLITS, default="dev")
    p.add_argument("--number", type=int, help="the first so many prompts of the split; all by default")
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--guidance", type=float, default=GUIDANCE)
    p.add_argument("--seed", type=int, default=0, help="of the first image")
    p.add_argument("--image", type=Path, help="save a grid of the samples here")


def run(args: argparse.Namespace) -> None:
    """Print the oracle's means over a split as JSON."""
    family = pipelines.load(args.model)
    split = f"video-{args.split}" if family.video else args.split
    captions = prompts(split)[: args.number]
    verdict = evaluate(family, captions, steps=args.steps, guidance=args.guidance, seed=args.seed, image=args.image)
    settings = {"model": str(args.model), "split": split, "prompts": len(captions), "steps": args.steps}
    print(json.dumps(settings | {"guidance": args.guidance, "seed": args.seed} | means(verdict), indent=2))
