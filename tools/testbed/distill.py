"""Distil a tiny base from the v base, in minutes instead of an hour.

It is of another family or prediction type, or predicts without guidance what the v base does with it.

The student learns the teacher's prediction at the same noise level, a target without the sampling noise of single
images. What both predict follows from the image and the noise that the teacher sees, whatever their parameterisation; a
rectified flow's x_t becomes the teacher's when it is scaled to unit variance. The noise level, not the timestep, is
matched: the teacher is given fractional timesteps.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
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
from tools.testbed.loop import fit, quick
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


@contextlib.contextmanager
def watched(*modules: nn.Module) -> Iterator[list[list[Any]]]:
    """What each of the modules, also compiled ones, returns while the block runs, call by call."""

    def keep(module: nn.Module) -> list[Any]:
        seen: list[Any] = []  # of a closure: a compiled module would go on appending to the list of its first call
        stack.callback(module.register_forward_hook(lambda _, __, output: seen.append(output)).remove)
        return seen

    with contextlib.ExitStack() as stack:
        yield [keep(module) for module in modules]


def feature_error(read: nn.Linear, tokens: Tensor, features: Tensor) -> Tensor:
    """Squared error [B, 1, H, W] of features [B, C, H, W] that are read off tokens [B, H W, D] of the same places.

    Each channel counts by its variance over the batch, whatever its scale.
    """
    channels = features.float().transpose(0, 1).flatten(1)
    mean, deviation = (x.view(-1, 1, 1) for x in (channels.mean(1), channels.std(1) + 1e-6))
    known = read(tokens.float()).transpose(1, 2).unflatten(2, features.shape[2:])
    return (known - (features.float() - mean) / deviation).square().mean(1, keepdim=True)


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
    base: Base, teacher: Any, student: Student, pools: tuple[Pool, Pool], read: nn.Linear | None = None
) -> Callable[[int], dict[str, Tensor]]:
    """The loss of a step: the student's mean squared error against what follows from the teacher's prediction.

    Args:
        read: reads the teacher's features off the student's tokens; adds their error, times `feature_weight`.
    """
    process, recipe = student.process, base.recipe.denoiser
    blocks = (teacher.denoiser.up_blocks[1].attentions[-1], student.block) if read is not None else ()

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
        with quick(), watched(*blocks) as seen:
            target = teacher_target(teacher, process, noisy, timesteps, captions, recipe.guidance)
            prediction = student.predict(noisy, timesteps, told, rng).float()
        if recipe.plant:
            faulty = -round(recipe.faulty_images[1] * recipe.batch) or len(latents)
            target[faulty:] = process.target(latents, noise, timesteps)[faulty:]
        error = (prediction - target).square()
        if process.prediction_type == "epsilon":  # measured in v, which does not vanish where noise is all
            error = error / process.alpha_sigma(timesteps)[0].float().square().view(-1, 1, 1, 1)
        sigma = process.alpha_sigma(timesteps)[1]
        terms = {"error": weighted_mean(base, drawn, error, sigma)}
        if read is not None:  # the first call has captions; a joint block returns text tokens, then image tokens
            (features,), (_, tokens) = (calls[0] for calls in seen)
            error = feature_error(read, tokens, features)
            terms["features"] = recipe.feature_weight * weighted_mean(base, drawn, error, sigma)
        return terms

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
    torch.manual_seed(recipe.seed)
    student = STUDENTS[args.student](teacher.pipe)
    if args.start:
        student.start_from(pipelines.load(args.start).pipe)
    model, read = nn.ModuleDict(dict(student.trained.items())), None
    if recipe.denoiser.feature_weight:
        if student.block is None:
            raise SystemExit(f"denoiser.feature_weight={recipe.denoiser.feature_weight:g}: {args.student} is a UNet")
        read = nn.Linear(student.family.denoiser.inner_dim, teacher.denoiser.config.block_out_channels[1])
        model["features"] = read
    pools = make_pools(base, teacher.pipe.vae, args.work)

    def on_checkpoint(average: nn.ModuleDict, step: int) -> None:
        report_on(student.assemble(average), step, recipe.evaluated, args.work / f"{args.student}_{step}.png")

    loop = loop_config(recipe)
    losses = distillation(base, teacher, student, pools, read)
    if recipe.denoiser.compile:
        student.family.denoiser.compile()
    average = fit(model, losses, loop, args.work / f"distilled_{args.student}.pt", on_checkpoint)
    save(student.assemble(average), args.out)
    print(f"saved {args.out}")
