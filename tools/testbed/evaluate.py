"""Sample a base on the prompts of a split and judge the samples by the oracle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import pipelines
from t2i_align.testbed.oracle import Verdict
from t2i_align.testbed.prompts import SPLITS, prompts
from t2i_align.testbed.world import CLIPS, IMAGES
from tools.testbed.sampling import GUIDANCE, STEPS, load, model_folder, sample


def means(verdict: Verdict) -> dict[str, float]:
    """Mean of the reward and of each of its parts, attributes over prompts that state them."""
    stated = {"reward": verdict.reward, **verdict.columns()}
    return {name: float(np.nanmean(values)) for name, values in stated.items() if not np.isnan(values).all()}


def summary(verdict: Verdict) -> str:
    """The means on one line."""
    return " ".join(f"{name} {value:.3f}" for name, value in means(verdict).items())


def grid(images: Tensor, columns: int = 16) -> Image.Image:
    """Images [B, 3, H, W] in [0, 1] side by side; an incomplete last row is left out."""
    rows = len(images) // columns
    height, width = images.shape[-2:]
    tiles = images[: rows * columns].reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    array = (tiles.reshape(rows * height, columns * width, 3) * 255).round().byte().numpy()
    return Image.fromarray(array)


def evaluate(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    image: Path | None = None,
) -> Verdict:
    """Judge one sample per caption, with seeds seed, seed + 1, ...; `image` saves a grid of them, two clips a row."""
    samples = sample(pipeline, captions, range(seed, seed + len(captions)), steps=steps, guidance=guidance)
    clips = samples.ndim == 5
    if image is not None and len(samples) >= 16:
        grid(samples.flatten(0, 1), 2 * samples.shape[1]).save(image) if clips else grid(samples).save(image)
    return (CLIPS if clips else IMAGES).oracle().judge(samples, captions)


def main(argv: list[str] | None = None) -> None:
    """Print the oracle's means over a split as JSON."""
    p = argparse.ArgumentParser(prog="python -m tools.testbed evaluate", description=__doc__)
    p.add_argument("model", type=model_folder, help="folder of a diffusers pipeline, testbed:sd or another base")
    p.add_argument("--split", choices=SPLITS, default="dev")
    p.add_argument("--number", type=int, help="the first so many prompts of the split; all by default")
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--guidance", type=float, default=GUIDANCE)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--image", type=Path, help="save a grid of the samples here")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    pipeline = load(args.model)
    split = f"video-{args.split}" if pipelines.wrap(pipeline).video else args.split
    captions = prompts(split)[: args.number]
    verdict = evaluate(pipeline, captions, steps=args.steps, guidance=args.guidance, seed=args.seed, image=args.image)
    settings = {"model": str(args.model), "split": split, "prompts": len(captions), "steps": args.steps}
    print(json.dumps(settings | {"guidance": args.guidance, "seed": args.seed} | means(verdict), indent=2))
