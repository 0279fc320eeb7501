"""Pretrain a tiny base on a small world: autoencoder, text warm-up, denoiser, pipeline.

Every stage leaves its result in the work folder and is skipped or continued when that exists, so the command can be
killed and run again. `distill` makes the other bases from the image base.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from torch import nn

from t2i_align.testbed.prompts import prompts
from tools.testbed.base import Base
from tools.testbed.denoiser import make_pools, train_denoiser
from tools.testbed.evaluate import evaluate, summary
from tools.testbed.sampling import output_arguments, save, start
from tools.testbed.sd import SD
from tools.testbed.text import warm_up
from tools.testbed.vae import train_vae
from tools.testbed.wan import Wan


def parser(command: str, base: type[Base]) -> argparse.ArgumentParser:
    """Options of the command; the defaults are the shipped base's recipe."""
    p = argparse.ArgumentParser(prog=f"python -m tools.testbed {command}", description=__doc__.split("\n")[0])
    output_arguments(p, "folder of the finished pipeline, e.g. tiny-sd")
    p.add_argument("--work", type=Path, default=Path(command), help="folder of checkpoints and latents")
    p.add_argument("--vae-steps", type=int, help="the phases' steps are scaled to this sum")
    p.add_argument("--vae-mosaic-steps", type=int, help="of these, steps of the first phase, which sees small crops")
    p.add_argument(
        "--vae-samples",
        "--vae-clips",
        type=int,
        default=base.vae_recipe.number,
        help="drawn samples for the autoencoder",
    )
    p.add_argument("--vae-lr", type=float, default=base.vae_recipe.lr)
    p.add_argument(
        "--samples", "--clips", type=int, default=base.clean.number, help="clean samples; faulty ones in proportion"
    )
    p.add_argument("--text-steps", type=int, default=base.text_steps)
    p.add_argument("--steps", type=int, default=base.recipe.steps)
    p.add_argument("--batch", type=int, default=base.recipe.batch)
    share = base.recipe.clean_fraction
    p.add_argument("--clean-fraction", type=float, default=share, help="share of steps without faults")
    p.add_argument("--lr", type=float, default=base.recipe.lr)
    p.add_argument("--every", type=int, default=700, help="steps between checkpoints, each of which is evaluated")
    p.add_argument("--evaluated", type=int, default=64, help="dev prompts sampled at each checkpoint")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=base.bf16, help="the autoencoder's step")
    return p


def main(argv: list[str] | None = None, command: str = "pretrain") -> None:
    """Train what is missing, evaluate on dev prompts at every checkpoint, and save the pipeline."""
    kind = Wan if command == "pretrain-video" else SD
    args = parser(command, kind).parse_args(argv)
    start(args)
    args.work.mkdir(parents=True, exist_ok=True)
    base = kind()
    vae_recipe = dataclasses.replace(base.vae_recipe, lr=args.vae_lr, number=args.vae_samples, seed=args.seed)
    vae_recipe = vae_recipe.scaled(args.vae_steps or vae_recipe.steps, args.vae_mosaic_steps)
    vae = train_vae(base, vae_recipe, args.work / "vae.pt", compiled=args.compile)
    pools = make_pools(base, vae, args.work, args.samples)
    text = warm_up(base, pools[0].drawn, steps=args.text_steps, seed=args.seed, state_file=args.work / "text.pt")

    def on_checkpoint(average: nn.ModuleDict, step: int) -> None:
        pipeline = base.assemble(vae, average["text_encoder"], average["denoiser"])
        save(pipeline, args.work / "latest")
        verdict = evaluate(pipeline, prompts(base.dev)[: args.evaluated], image=args.work / f"{step}.png")
        print(f"dev at step {step}: {summary(verdict)}", flush=True)

    names = ("steps", "batch", "clean_fraction", "lr", "seed")
    recipe = dataclasses.replace(base.recipe, **{name: getattr(args, name) for name in names})
    average = train_denoiser(base, text, pools, recipe, args.work / "denoiser.pt", on_checkpoint, every=args.every)
    save(base.assemble(vae, average["text_encoder"], average["denoiser"]), args.out)
    print(f"saved {args.out}")
