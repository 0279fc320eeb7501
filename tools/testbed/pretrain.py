"""Pretrain a tiny Stable Diffusion on the small world: autoencoder, text warm-up, denoiser, pipeline.

Every stage leaves its result in the work folder and is skipped or continued when that exists, so the
command can be killed and run again. `distill` makes the other bases from this one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from t2i_align.testbed.prompts import prompts
from tools.testbed.denoiser import Denoiser, DenoiserConfig, build_unet, train_denoiser
from tools.testbed.evaluate import evaluate, summary
from tools.testbed.pools import CLEAN, FAULTY, Pool, make_pool
from tools.testbed.sampling import assemble, save
from tools.testbed.text import ParseHeads, build_text_encoder, build_tokenizer, warm_up
from tools.testbed.vae import VAEConfig, train_vae


def parser() -> argparse.ArgumentParser:
    """Options of the command; the defaults are the shipped v base's recipe."""
    vae, denoiser = VAEConfig(), DenoiserConfig()
    p = argparse.ArgumentParser(prog="python -m tools.testbed pretrain", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline, e.g. tiny-sd")
    p.add_argument("--work", type=Path, default=Path("pretrain"), help="folder of checkpoints and latents")
    p.add_argument("--vae-steps", type=int, default=vae.steps)
    p.add_argument("--vae-mosaic-steps", type=int, default=vae.mosaic_steps)
    p.add_argument("--vae-lr", type=float, default=vae.lr)
    p.add_argument("--text-steps", type=int, default=120)
    p.add_argument("--steps", type=int, default=denoiser.steps)
    p.add_argument(
        "--clean-fraction", type=float, default=denoiser.clean_fraction, help="share of steps without faults"
    )
    p.add_argument("--lr", type=float, default=denoiser.lr)
    p.add_argument("--every", type=int, default=760, help="steps between checkpoints, each of which is evaluated")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the autoencoder's step")
    p.add_argument("--force", action="store_true", help="replace --out where it exists")
    return p


def _vae(args: argparse.Namespace) -> AutoencoderKL:
    if (args.work / "vae").exists():
        return AutoencoderKL.from_pretrained(args.work / "vae")
    config = VAEConfig(steps=args.vae_steps, mosaic_steps=args.vae_mosaic_steps, lr=args.vae_lr, seed=args.seed)
    return train_vae(args.work, config, compile_step=args.compile)


def _denoiser(args: argparse.Namespace, tokenizer: CLIPTokenizer, pool: Pool) -> Denoiser:
    """A fresh denoiser with a warmed-up text encoder."""
    torch.manual_seed(args.seed)
    model = Denoiser(build_unet(), build_text_encoder(tokenizer, CLIPTextModel), ParseHeads())
    text_file = args.work / "text.pt"
    if text_file.exists():
        state = torch.load(text_file, weights_only=True)
        model.text_encoder.load_state_dict(state["text_encoder"])
        model.heads.load_state_dict(state["heads"])
    else:
        warm_up(model.text_encoder, model.heads, tokenizer, pool.drawn[:8000], steps=args.text_steps, seed=args.seed)
        torch.save({"text_encoder": model.text_encoder.state_dict(), "heads": model.heads.state_dict()}, text_file)
    return model


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, evaluate on dev prompts at every checkpoint, and save the pipeline."""
    args = parser().parse_args(argv)
    if args.out.exists() and not args.force:
        raise SystemExit(f"{args.out} exists; pass --force to replace it")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    vae = _vae(args)
    clean = make_pool(CLEAN, vae, args.work / "latents_clean.pt")
    tokenizer = build_tokenizer()
    model = _denoiser(args, tokenizer, clean)
    faulty = make_pool(FAULTY, vae, args.work / "latents_faulty.pt")

    def pipeline_of(average: Denoiser) -> StableDiffusionPipeline:
        return assemble(vae, average.text_encoder, tokenizer, average.unet, "v_prediction")

    def on_checkpoint(average: Denoiser, step: int) -> None:
        pipeline = pipeline_of(average)
        save(pipeline, args.work / "latest")
        verdict = evaluate(pipeline, prompts("dev")[:64], image=args.work / f"{step}.png")
        print(f"dev at step {step}: {summary(verdict)}", flush=True)

    config = DenoiserConfig(
        steps=args.steps,
        clean_fraction=args.clean_fraction,
        lr=args.lr,
        seed=args.seed,
    )
    average = train_denoiser(
        args.work,
        model,
        tokenizer,
        (clean, faulty),
        config,
        on_checkpoint=on_checkpoint,
        every=args.every,
    )
    save(pipeline_of(average), args.out)
    print(f"saved {args.out}")
