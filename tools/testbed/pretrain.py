"""Pretrain a tiny base on a small world: autoencoder, text warm-up, denoiser, pipeline.

Every stage leaves its result in the work folder and is skipped or continued when that exists, so the command can be
killed and run again. `distill` makes the other bases from the image base.
"""

from __future__ import annotations

import argparse
import dataclasses

from diffusers import DiffusionPipeline
from torch import nn

from tools.testbed.base import Base
from tools.testbed.denoiser import make_pools, train_denoiser, warm_up
from tools.testbed.evaluate import report_on
from tools.testbed.sampling import output_options, save, training_options
from tools.testbed.sd import SD
from tools.testbed.vae import train_vae
from tools.testbed.wan import Wan


def options(p: argparse.ArgumentParser, video: bool) -> None:
    """The defaults are the shipped base's recipe."""
    base: Base = Wan() if video else SD()
    vae, recipe = base.vae_recipe, base.recipe
    output_options(p, "folder of the finished pipeline, e.g. tiny-sd")
    training_options(
        p,
        work="pretrain-video" if video else "pretrain",
        every=700,
        samples=base.clean.number,
        steps=recipe.steps,
        batch=recipe.batch,
        lr=recipe.lr,
    )
    p.add_argument("--vae-steps", type=int, default=vae.steps, help="the phases' steps are scaled to this sum")
    p.add_argument("--vae-mosaic-steps", type=int, help="of these, steps of the first phase, which sees small crops")
    p.add_argument("--vae-samples", "--vae-clips", type=int, default=vae.number, help="drawn for the autoencoder")
    p.add_argument("--vae-lr", type=float, default=vae.lr)
    p.add_argument("--text-steps", type=int, default=base.text_steps)
    p.add_argument("--clean-fraction", type=float, default=recipe.clean_fraction, help="share of steps without faults")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=base.bf16, help="the autoencoder's step")


def run(args: argparse.Namespace) -> None:
    """Train what is missing, evaluate on dev prompts at every checkpoint, and save the pipeline."""
    base: Base = Wan() if args.video else SD()
    args.work.mkdir(parents=True, exist_ok=True)
    vae_recipe = dataclasses.replace(base.vae_recipe, lr=args.vae_lr, number=args.vae_samples, seed=args.seed)
    vae_recipe = vae_recipe.scaled(args.vae_steps, args.vae_mosaic_steps)
    vae = train_vae(base, vae_recipe, args.work / "vae.pt", compiled=args.compile)
    pools = make_pools(base, vae, args.work, args.samples)
    text = warm_up(base, pools[0].drawn, steps=args.text_steps, seed=args.seed, state_file=args.work / "text.pt")

    def assemble(trained: nn.ModuleDict) -> DiffusionPipeline:
        return base.assemble(vae, trained["text_encoder"], trained["denoiser"])

    def on_checkpoint(average: nn.ModuleDict, step: int) -> None:
        pipeline = assemble(average)
        save(pipeline, args.work / "latest")
        report_on(pipeline, step, args.evaluated, args.work / f"{step}.png")

    names = ("steps", "batch", "clean_fraction", "lr", "seed")
    recipe = dataclasses.replace(base.recipe, **{name: getattr(args, name) for name in names})
    average = train_denoiser(base, text, pools, recipe, args.work / "denoiser.pt", on_checkpoint, every=args.every)
    save(assemble(average), args.out)
    print(f"saved {args.out}")
