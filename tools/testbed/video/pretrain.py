"""Pretrain a tiny Wan on the small world in motion: autoencoder, text warm-up, denoiser, pipeline.

Every stage leaves its result in the work folder and is skipped or continued when that exists, so the command can be
killed and run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import T5Tokenizer

from t2i_align.testbed.clip_captions import words
from t2i_align.testbed.clips import Clip
from t2i_align.testbed.prompts import prompts
from tools.testbed.evaluate import evaluate, summary
from tools.testbed.pools import Pool
from tools.testbed.sampling import save
from tools.testbed.text import build_word_tokenizer
from tools.testbed.video.denoiser import RECIPE, VideoDenoiser, build_scheduler, build_transformer, train_denoiser
from tools.testbed.video.pools import CLEAN, FAULTY, ClipPoolConfig, make_pool
from tools.testbed.video.text import ParseHeads, build_text_encoder, warm_up
from tools.testbed.video.vae import VideoVAEConfig, finish, train_vae


def parser() -> argparse.ArgumentParser:
    """Options of the command; the defaults are the shipped base's recipe."""
    vae = VideoVAEConfig()
    p = argparse.ArgumentParser(prog="python -m tools.testbed pretrain-video", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline, e.g. tiny-wan")
    p.add_argument("--work", type=Path, default=Path("pretrain-video"), help="folder of checkpoints and latents")
    p.add_argument("--vae-steps", type=int, help="the phases' steps are scaled to this sum")
    p.add_argument("--vae-clips", type=int, default=vae.pool, help="clips the autoencoder learns from")
    p.add_argument("--vae-lr", type=float, default=vae.lr)
    p.add_argument(
        "--clips", type=int, default=CLEAN.number, help="clean clips to learn from; faulty ones in proportion"
    )
    p.add_argument("--text-steps", type=int, default=200)
    p.add_argument("--steps", type=int, default=RECIPE.steps)
    p.add_argument("--batch", type=int, default=RECIPE.batch)
    p.add_argument("--clean-fraction", type=float, default=RECIPE.clean_fraction, help="share of steps without faults")
    p.add_argument("--lr", type=float, default=RECIPE.lr)
    p.add_argument("--every", type=int, default=650, help="steps between checkpoints, each of which is evaluated")
    p.add_argument("--evaluated", type=int, default=64, help="dev prompts sampled at each checkpoint")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--force", action="store_true", help="replace --out where it exists")
    return p


def _vae(args: argparse.Namespace) -> AutoencoderKLWan:
    folder = args.work / "vae"
    if folder.exists():
        return AutoencoderKLWan.from_pretrained(folder)
    config = VideoVAEConfig(lr=args.vae_lr, pool=args.vae_clips, seed=args.seed)
    vae = train_vae(args.work, config.scaled(args.vae_steps) if args.vae_steps else config)
    finish(vae, args.seed, min(400, args.vae_clips))
    temporary = args.work / "vae.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    vae.save_pretrained(temporary)
    temporary.rename(folder)  # the finished folder is what the next run looks for
    return vae


def _denoiser(args: argparse.Namespace, tokenizer: T5Tokenizer, pool: Pool[Clip]) -> VideoDenoiser:
    """A fresh denoiser with a warmed-up text encoder."""
    torch.manual_seed(args.seed)
    model = VideoDenoiser(build_transformer(), build_text_encoder(tokenizer), ParseHeads())
    file = args.work / "text.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.text_encoder.load_state_dict(state["text_encoder"])
        model.heads.load_state_dict(state["heads"])
    else:
        warm_up(model.text_encoder, model.heads, tokenizer, pool.drawn, steps=args.text_steps, seed=args.seed)
        torch.save({"text_encoder": model.text_encoder.state_dict(), "heads": model.heads.state_dict()}, file)
    return model


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, evaluate on dev prompts at every checkpoint, and save the pipeline."""
    args = parser().parse_args(argv)
    if args.out.exists() and not args.force:
        raise SystemExit(f"{args.out} exists; pass --force to replace it")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    vae = _vae(args)
    share = args.clips / CLEAN.number
    clean, faulty = (
        make_pool(_sized(config, share), vae, args.work / f"latents_{name}.pt")
        for config, name in ((CLEAN, "clean"), (FAULTY, "faulty"))
    )
    tokenizer = build_word_tokenizer(words())
    model = _denoiser(args, tokenizer, clean)

    def pipeline_of(average: VideoDenoiser) -> WanPipeline:
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=average.text_encoder,
            vae=vae,
            scheduler=build_scheduler(),
            transformer=average.transformer,
        )

    def on_checkpoint(average: VideoDenoiser, step: int) -> None:
        pipeline = pipeline_of(average)
        save(pipeline, args.work / "latest")
        verdict = evaluate(pipeline, prompts("video-dev")[: args.evaluated], image=args.work / f"{step}.png")
        print(f"dev at step {step}: {summary(verdict)}", flush=True)

    recipe = dataclasses.replace(
        RECIPE, steps=args.steps, batch=args.batch, clean_fraction=args.clean_fraction, lr=args.lr, seed=args.seed
    )
    average = train_denoiser(
        args.work, model, tokenizer, (clean, faulty), recipe, on_checkpoint=on_checkpoint, every=args.every
    )
    save(pipeline_of(average), args.out)
    print(f"saved {args.out}")


def _sized(config: ClipPoolConfig, share: float) -> ClipPoolConfig:
    return dataclasses.replace(config, number=max(1, round(config.number * share)))
