"""Pretrain a tiny base on a small world: autoencoder, text warm-up, denoiser, pipeline.

Every stage leaves its result in the work folder and is skipped or continued when that exists, so the command can be
killed and run again. `distill` makes the other bases from the image base.
"""

from __future__ import annotations

import argparse

from diffusers import DiffusionPipeline
from torch import nn

import pipelines
from tools.testbed.base import Base
from tools.testbed.denoiser import make_pools, train_denoiser, warm_up
from tools.testbed.evaluate import report_on
from tools.testbed.sampling import model_folder, output_options, recipe_options, save
from tools.testbed.sd import SD
from tools.testbed.vae import train_vae
from tools.testbed.wan import Wan


def options(p: argparse.ArgumentParser, video: bool) -> None:
    """The defaults are the shipped base's recipe."""
    output_options(p, "folder of the finished pipeline, e.g. tiny-sd")
    recipe_options(p, work="pretrain-video" if video else "pretrain")
    p.add_argument("--start", type=model_folder, help="a base to train further; its autoencoder stays as it is")


def run(args: argparse.Namespace) -> None:
    """Train what is missing, evaluate on dev prompts at every checkpoint, and save the pipeline."""
    base: Base = Wan(args.overrides) if args.video else SD(args.overrides)
    args.work.mkdir(parents=True, exist_ok=True)
    start = pipelines.load(args.start) if args.start else None
    vae = start.pipe.vae if start else train_vae(base, args.work / "vae.pt")
    pools = make_pools(base, vae, args.work)
    text = warm_up(base, pools[0].drawn, args.work / "text.pt", start.pipe.text_encoder if start else None)

    def assemble(trained: nn.ModuleDict) -> DiffusionPipeline:
        return base.assemble(vae, trained["text_encoder"], trained["denoiser"])

    def on_checkpoint(average: nn.ModuleDict, step: int) -> None:
        pipeline = assemble(average)
        save(pipeline, args.work / "latest")
        report_on(pipeline, step, base.recipe.evaluated, args.work / f"{step}.png")

    weights = start.denoiser.state_dict() if start else None
    average = train_denoiser(base, text, pools, args.work / "denoiser.pt", on_checkpoint, weights)
    save(assemble(average), args.out)
    print(f"saved {args.out}")
