"""Distil a tiny base of another family or prediction type from the v base, in minutes instead of an hour.

The student learns the teacher's prediction at the same noise level, a target without the sampling noise of
single images. What both predict follows from the image and the noise that the teacher sees, whatever their
parameterisation; a rectified flow's x_t becomes the teacher's when it is scaled to unit variance. The noise
level, not the timestep, is matched: the teacher is given fractional timesteps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from pipelines import VariancePreserving
from t2i_align.testbed import base_path
from t2i_align.testbed.prompts import prompts
from tools.testbed.base import DenoiserRecipe
from tools.testbed.denoiser import Pool, draw_batch, draw_timesteps, make_pools
from tools.testbed.evaluate import evaluate, summary
from tools.testbed.loop import LoopConfig, fit, mixed
from tools.testbed.sampling import load, model_folder, output_arguments, save, start
from tools.testbed.sd import SD
from tools.testbed.students import STUDENTS, Student
from tools.testbed.text import WordEncoder


def teacher_timesteps(levels: Tensor, teacher_alphas_cumprod: Tensor) -> Tensor:
    """The teacher's fractional timesteps [B] at which its abar is `levels` [B]."""
    falling = teacher_alphas_cumprod.numpy()
    numbers = np.arange(len(falling))
    return torch.from_numpy(np.interp(levels.numpy(), falling[::-1], numbers[::-1])).float()


@dataclasses.dataclass
class Distillation:
    """The loss of a step: the student's mean squared error against what follows from the teacher's prediction."""

    base: SD
    teacher: UNet2DConditionModel
    text_encoder: CLIPTextModel
    teacher_process: VariancePreserving
    student: Student
    to_ids: WordEncoder
    pools: tuple[Pool, Pool]
    recipe: DenoiserRecipe

    def __post_init__(self) -> None:
        self.process = self.student.process

    def __call__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, 13, step))
        latents, captions, _ = draw_batch(self.pools, self.base, rng, self.recipe, faulty=True)
        timesteps = draw_timesteps(rng, self.recipe)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        noisy = self.process.add_noise(latents, noise, timesteps)
        with mixed():
            with torch.no_grad():
                target = self.target(noisy, timesteps, captions)
            prediction = self.student.predict(noisy, timesteps, captions, rng).float()
        error = (prediction - target).square()
        if self.process.prediction_type == "epsilon":  # measured in v, which does not vanish where noise is all
            error = error / self.process.alpha_sigma(timesteps)[0].float().square().view(-1, 1, 1, 1)
        return {"error": error.mean()}

    def target(self, noisy: Tensor, timesteps: Tensor, captions: list[str]) -> Tensor:
        """What the student should predict at x_t, [B, 4, 16, 16], by the teacher's view of its image and noise."""
        alpha, sigma = self.process.alpha_sigma(timesteps)
        scale = (alpha.square() + sigma.square()).sqrt()
        seen = noisy / scale.float().view(-1, 1, 1, 1)
        level = (alpha / scale).square()
        times = teacher_timesteps(level, self.teacher_process.alphas_cumprod)
        velocity = self.teacher(seen, times, self.text_encoder(self.to_ids(captions)).last_hidden_state)[0].float()
        a, s = (x.float().view(-1, 1, 1, 1) for x in (level.sqrt(), (1 - level).sqrt()))
        return self.process.target(a * seen - s * velocity, s * seen + a * velocity, timesteps)


def parser() -> argparse.ArgumentParser:
    """Options of the command; the defaults are the epsilon base's recipe."""
    p = argparse.ArgumentParser(prog="python -m tools.testbed distill", description=__doc__.split("\n")[0])
    p.add_argument("--student", choices=list(STUDENTS), default="sd-eps", help="which base to make")
    output_arguments(p, "folder of the finished pipeline, e.g. tiny-sd-eps")
    p.add_argument("--teacher", type=model_folder, default=base_path("sd"), help="a v base; testbed:sd by default")
    p.add_argument("--work", type=Path, default=Path("distill"), help="folder of checkpoints and latents")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--noisiest-share", type=float, default=0.15, help="share of the times in the noisiest twentieth")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--every", type=int, default=300, help="steps between checkpoints, each of which is evaluated")
    p.add_argument("--samples", type=int, default=SD.clean.number, help="clean images; faulty ones in proportion")
    p.add_argument("--evaluated", type=int, default=64, help="dev prompts sampled at each checkpoint")
    return p


def main(argv: list[str] | None = None) -> None:
    """Distil, evaluate on dev prompts at every checkpoint, and save the pipeline."""
    args = parser().parse_args(argv)
    start(args)
    teacher = load(args.teacher)
    kind = json.loads((args.teacher / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
    if kind != "v_prediction":
        raise SystemExit(f"{args.teacher} predicts {kind}; the teacher must be a v base, e.g. testbed:sd")
    args.work.mkdir(parents=True, exist_ok=True)
    base = SD()
    pools = make_pools(base, teacher.vae, args.work, args.samples)
    torch.manual_seed(args.seed)
    student = STUDENTS[args.student](teacher)
    # Plain matrix products: at these sizes the fused kernel takes longer on a CPU.
    teacher.unet.requires_grad_(False).set_attn_processor(AttnProcessor())

    def on_checkpoint(average: nn.ModuleDict, step: int) -> None:
        pipeline = student.assemble(average)
        verdict = evaluate(pipeline, prompts("dev")[: args.evaluated], image=args.work / f"{args.student}_{step}.png")
        print(f"dev at step {step}: {summary(verdict)}", flush=True)

    recipe = dataclasses.replace(SD.recipe, batch=args.batch, seed=args.seed, noisiest_share=args.noisiest_share)
    average = fit(
        student.trained,
        Distillation(
            base,
            teacher.unet,
            teacher.text_encoder.requires_grad_(False),
            VariancePreserving(teacher.scheduler.alphas_cumprod, "v_prediction"),
            student,
            WordEncoder(teacher.tokenizer),
            pools,
            recipe,
        ),
        LoopConfig(steps=args.steps, lr=args.lr, every=args.every),
        args.work / f"distilled_{args.student}.pt",
        on_checkpoint,
    )
    save(student.assemble(average), args.out)
    print(f"saved {args.out}")
