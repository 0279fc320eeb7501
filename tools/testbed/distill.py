"""Distil a tiny base from the v base, in minutes instead of an hour.

It is of another family or prediction type, or predicts without guidance what the v base does with it.

The student learns the teacher's prediction at the same noise level, a target without the sampling noise of single
images. What both predict follows from the image and the noise that the teacher sees, whatever their parameterisation; a
rectified flow's x_t becomes the teacher's when it is scaled to unit variance. The noise level, not the timestep, is
matched: the teacher is given fractional timesteps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import pipelines
from pipelines import ForwardProcess
from t2i_align.testbed import base_path
from tools.testbed.base import Base
from tools.testbed.denoiser import (
    Pool,
    draw_batch,
    draw_captions,
    draw_timesteps,
    loop_config,
    make_pools,
    weighted_mean,
)
from tools.testbed.evaluate import report_on
from tools.testbed.loop import fit, mixed
from tools.testbed.sampling import model_folder, output_options, recipe_options, save
from tools.testbed.sd import SD
from tools.testbed.students import STUDENTS, Student


def teacher_timesteps(levels: Tensor, teacher_alphas_cumprod: Tensor) -> Tensor:
    """The teacher's fractional timesteps [B] at which its abar is `levels` [B]."""
    falling = teacher_alphas_cumprod.numpy()
    numbers = np.arange(len(falling))
    return torch.from_numpy(np.interp(levels.numpy(), falling[::-1], numbers[::-1])).float()


@torch.no_grad()
def teacher_target(
    teacher: Any,
    process: ForwardProcess,
    noisy: Tensor,
    timesteps: Tensor,
    captions: list[str],
    guidance: float = 1.0,
) -> Tensor:
    """What a student of this process should predict at x_t [B, 4, 16, 16], by the teacher's view of image and noise.

    Args:
        teacher: family of a v base, of which `process`, `encode_prompts` and `predict` are used.
        guidance: scale of its classifier-free guidance (arXiv 2207.12598).
    """
    alpha, sigma = process.alpha_sigma(timesteps)
    scale = (alpha.square() + sigma.square()).sqrt()
    seen = noisy / scale.float().view(-1, 1, 1, 1)
    level = (alpha / scale).square()
    times = teacher_timesteps(level, teacher.process.alphas_cumprod)
    velocity = teacher.predict(seen, times, teacher.encode_prompts(captions)).float()
    if guidance != 1.0:
        without = teacher.predict(seen, times, teacher.encode_prompts([""] * len(captions))).float()
        velocity = without + guidance * (velocity - without)
    a, s = (x.float().view(-1, 1, 1, 1) for x in (level.sqrt(), (1 - level).sqrt()))
    return process.target(a * seen - s * velocity, s * seen + a * velocity, timesteps)


def captions_with_and_without_faults(
    drawn: Sequence[Any], base: Base, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Captions that state the same of each scene, but for the planted faults; both "" where one is dropped."""
    pairs = []
    for item in drawn:
        seed = int(rng.integers(2**32))
        pairs.append([draw_captions([item], base, np.random.default_rng(seed), f)[0][0] for f in (True, False)])
    faulty, true = zip(*[pair if all(pair) else ("", "") for pair in pairs], strict=True)
    return list(faulty), list(true)


def distillation(
    base: Base, teacher: Any, student: Student, pools: tuple[Pool, Pool]
) -> Callable[[int], dict[str, Tensor]]:
    """The loss of a step: the student's mean squared error against what follows from the teacher's prediction."""
    process, recipe = student.process, base.recipe.denoiser

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((base.recipe.seed, 13, step))
        latents, drawn = draw_batch(pools, base, rng, faulty=True)
        if recipe.plant:
            told, captions = captions_with_and_without_faults(drawn, base, rng)
        else:
            told = captions = draw_captions(drawn, base, rng, faulty=True)[0]
        timesteps = draw_timesteps(rng, recipe)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        noisy = process.add_noise(latents, noise, timesteps)
        with mixed():
            target = teacher_target(teacher, process, noisy, timesteps, captions, recipe.guidance)
            prediction = student.predict(noisy, timesteps, told, rng).float()
        if recipe.plant:
            faulty = -round(recipe.faulty_images[1] * recipe.batch) or len(latents)
            target[faulty:] = process.target(latents, noise, timesteps)[faulty:]
        error = (prediction - target).square()
        if process.prediction_type == "epsilon":  # measured in v, which does not vanish where noise is all
            error = error / process.alpha_sigma(timesteps)[0].float().square().view(-1, 1, 1, 1)
        return {"error": weighted_mean(base, drawn, error, process.alpha_sigma(timesteps)[1])}

    return losses


def options(p: argparse.ArgumentParser, video: bool) -> None:
    p.add_argument("--student", choices=list(STUDENTS), default="sd-eps", help="which base to make")
    output_options(p, "folder of the finished pipeline, e.g. tiny-sd-eps")
    recipe_options(p, work="distill")
    p.add_argument("--start", type=model_folder, help="a base of the student's kind to train further")
    p.add_argument("--teacher", type=model_folder, default=base_path("sd"), help="a v base; testbed:sd by default")


def run(args: argparse.Namespace) -> None:
    """Distil, evaluate on dev prompts at every checkpoint, and save the pipeline."""
    teacher = pipelines.load(args.teacher)
    if teacher.process.prediction_type != "v_prediction":
        kind = teacher.process.prediction_type
        raise SystemExit(f"{args.teacher} predicts {kind}; the teacher must be a v base, e.g. testbed:sd")
    args.work.mkdir(parents=True, exist_ok=True)
    base = SD(args.overrides, recipe=args.student)
    recipe = base.recipe
    pools = make_pools(base, teacher.pipe.vae, args.work)
    torch.manual_seed(recipe.seed)
    student = STUDENTS[args.student](teacher.pipe)
    if args.start:
        student.start_from(pipelines.load(args.start).pipe)
    # Plain matrix products: at these sizes the fused kernel takes longer on a CPU.
    teacher.denoiser.set_attn_processor(AttnProcessor())

    def on_checkpoint(average: nn.ModuleDict, step: int) -> None:
        report_on(student.assemble(average), step, recipe.evaluated, args.work / f"{args.student}_{step}.png")

    loop = loop_config(recipe)
    losses = distillation(base, teacher, student, pools)
    average = fit(student.trained, losses, loop, args.work / f"distilled_{args.student}.pt", on_checkpoint)
    save(student.assemble(average), args.out)
    print(f"saved {args.out}")
