"""Reward fine-tuning: a scorer's gradient, back through the decoder and the sampler (arXiv 2410.11817 and others).

    x̂0 = sample(x_T, prompt),    loss = -scale r(decode(x̂0), prompt),  or scale relu(target - r) with a target

Which steps of the sampler carry the gradient is the schedule's (`t2i_align.diffusion.sampling`). The loss has no
reference; what keeps the model from fooling the scorer is a small learning rate, few steps, a target, scores that are
not trained on (`validation.scorers` with `validation.patience`), and a limit of the drift from the model before
training, measured on noised samples of the policy (`health.max_drift`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import random_noise, repeated
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.diffusion.sampling import Sampler, schedule
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.utils.settings import Bool, Count, Float, Limit, Positive, settings


class _Needs:
    """Of an instance with `drift` also the reference."""

    def __get__(self, objective: Any, cls: type) -> Requirements:
        return Requirements(scorer=True, reference=objective is not None and objective.drift)


@settings
class RewardTuning(Objective):
    """Reward fine-tuning on prompts alone, with any differentiable scorer.

    scorer: such as `hpsv2.1` or `denscore:pickscore`. schedule: see `t2i_align.diffusion.sampling`; every, last: its
    numbers. sampling_steps, guidance: of the sampler. unconditional_gradient: whether gradients pass guidance's
    unconditional branch. equalise: weigh all gradient steps alike. scale: of the loss. target: scores above it have
    no gradient (null: none; ReFL's is 2 with ImageReward). drift: log the mean squared difference between the policy's
    and the reference's predictions, for `health.max_drift`; without a LoRA this takes a copy of the model.
    latent_frames: of clips, how many from the beginning are decoded and scored (null: all).
    """

    scorer: str = "hpsv2.1"
    schedule: Literal["longalign", "refl", "draft", "draft_lv", "alignprop"] = "longalign"
    sampling_steps: Count = 50
    guidance: Limit = 7.5
    every: Count = 10
    last: Count = 1
    unconditional_gradient: Bool = True
    equalise: Bool = False
    scale: Positive = 1.0
    target: Float | None = None
    drift: Bool = False
    latent_frames: Count | None = None

    name = "reward"
    paper = "arXiv 2410.11817"
    config = "sd15_reward.yaml"
    needs: ClassVar[Any] = _Needs()

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        assert batch.rewarder is not None and batch.empty is not None
        plan = schedule(self.schedule, self.sampling_steps, rng, every=self.every, last=self.last)
        sampler = Sampler(
            process=rng.process, steps=self.sampling_steps, guidance=self.guidance,
            unconditional_gradient=self.unconditional_gradient, equalise=self.equalise,
        )  # fmt: skip
        noise = rng.normal("noise", batch.latents.shape[2:]).to(batch.latents.dtype)
        conditioning, empty = repeated(batch.conditioning, batch.empty, len(noise))
        clean = sampler.sample(policy, noise, conditioning, empty, plan, rng)
        times = len(clean) // len(noise)
        scores, parts = batch.rewarder(clean, [prompt for prompt in batch.prompts for _ in range(times)])
        reward = scores.view(-1, times).mean(1)
        loss = -reward if self.target is None else relu(self.target - scores).view(-1, times).mean(1)
        metrics = {"reward": reward, **{f"reward/{name}": part.view(-1, times).mean(1) for name, part in parts.items()}}
        if self.drift:
            first = clean.detach().unflatten(0, (-1, times))[:, :1]
            with torch.no_grad():
                noised = random_noise(replace(batch, latents=first), rng)
                metrics["drift"] = (noised.residuals(policy) - noised.residuals(reference)).square().mean((1, 2))
        return self.scale * loss, {name: value.detach() for name, value in metrics.items()}
