"""Sampling with gradients: each schedule against finite differences, its randomness, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pipelines import ForwardProcess
from t2i_align.data.batch import Conditioning
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.diffusion.sampling import Sampler, Schedule, schedule, without_gradient
from tests.objectives.toy import KINDS, PROCESSES

STEPS = 3
GUIDANCE = 2.0
KEYS = [f"0/{i}" for i in range(5)]
NAMES = ["longalign", "refl", "draft", "draft_lv", "alignprop"]


def toy(parameter: Tensor) -> Any:
    """A model that is not linear in its input or its parameter [2]."""

    def model(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        bias = (conditioning["prompt_embeds"] + t / 1000).view(-1, 1, 1, 1)
        return torch.tanh(parameter[0] * x + bias) + parameter[1] * torch.sin(x.mean((1, 2, 3), True))

    return model


def inputs(rows: slice = slice(0, 5)) -> tuple[Tensor, Conditioning, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)[rows]
    text = torch.randn(5, generator=generator, dtype=torch.float64)[rows]
    return noise, {"prompt_embeds": text}, {"prompt_embeds": torch.zeros_like(text)}


def frozen_sampling(
    process: ForwardProcess, plan: Schedule, theta: Tensor, at: Tensor, rng: SampleRNG, weight: list[float],
    through_empty: bool,
) -> Tensor:  # fmt: skip
    """Sampling written out, as a function of theta near `at`: what has no gradient is computed at `at`."""
    noise, text, empty = inputs()
    times = process.sampling_times(STEPS)

    def guided(x: Tensor, x_at: Tensor, t: Tensor, parameter: Tensor) -> Tensor:
        away = toy(parameter)(x, t, empty) if through_empty else toy(at)(x_at, t, empty)
        return away + GUIDANCE * (toy(parameter)(x, t, text) - away)

    def step(i: int, x: Tensor, x_at: Tensor, rows: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        t = times[i].expand(5)
        still = guided(x_at, x_at, t, at)
        moving = guided(x if plan.through else x_at, x_at, t, theta)
        moving = still + weight * (moving - still)
        return torch.where(rows.view(-1, 1, 1, 1), moving, still), still

    x = x_at = noise
    clean = torch.zeros_like(noise)
    for i in range(STEPS):
        t = times[i].expand(5)
        if i == STEPS - 1 and plan.noisings:
            last = process.to_clean(guided(x_at, x_at, t, at), x_at, t)
            out = []
            for number in range(plan.noisings):
                again = process.add_noise(last, rng.normal(f"noising {number}", last.shape[1:]).to(last), t)
                out.append(process.to_clean(step(i, again, again, plan.gradient[i], 1.0)[0], again, t))
            return torch.stack(out, 1).flatten(0, 1)
        moving, still = step(i, x, x_at, plan.gradient[i], weight[i])
        clean = torch.where((plan.stop == i).view(-1, 1, 1, 1), process.to_clean(moving, x, t), clean)
        if i < STEPS - 1:
            s = times[i + 1].expand(5)
            x, x_at = process.step(moving, x, t, s), process.step(still, x_at, t, s)
    return clean


@KINDS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"unconditional_gradient": False}, {"equalise": True}], ids=str)
def test_gradient_equals_finite_differences(name: Any, options: dict[str, bool], kind: str) -> None:
    process, rng = PROCESSES[kind], SampleRNG(1, KEYS, PROCESSES[kind])
    plan = schedule(name, STEPS, rng, every=2, last=2)
    sampler = Sampler(process=process, steps=STEPS, guidance=GUIDANCE, **options)
    at = torch.tensor([0.3, 0.1], dtype=torch.float64)
    parameter = at.clone().requires_grad_()
    clean = sampler.sample(toy(parameter), *inputs(), plan, rng)
    (gradient,) = torch.autograd.grad(torch.tanh(clean / 10).sum(), parameter)
    weights, through = sampler.step_weights(), options.get("unconditional_gradient", True)

    def value(theta: Tensor) -> Tensor:
        return frozen_sampling(process, plan, theta, at, rng, weights, through).div(10).tanh().sum()

    torch.testing.assert_close(clean.detach(), frozen_sampling(process, plan, at, at, rng, weights, through))
    for place in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[place] = 1e-5
        difference = (value(at + shift) - value(at - shift)) / 2e-5
        torch.testing.assert_close(gradient[place], difference, rtol=1e-5, atol=1e-7)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_neighbours(name: Any) -> None:
    process = PROCESSES["flow"]
    sampler = Sampler(process=process, steps=6, guidance=GUIDANCE)

    def sampled(rows: slice) -> tuple[Tensor, Tensor]:
        rng = SampleRNG(1, KEYS[rows], process)
        parameter = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
        clean = sampler.sample(toy(parameter), *inputs(rows), schedule(name, 6, rng, every=3, last=2), rng)
        return clean, torch.autograd.grad(torch.tanh(clean / 10).sum(), parameter)[0]

    clean, gradient = sampled(slice(0, 5))
    rows = [sampled(slice(i, i + 1)) for i in range(5)]
    torch.testing.assert_close(clean, torch.cat([row[0] for row in rows]))
    torch.testing.assert_close(gradient, torch.stack([row[1] for row in rows]).sum(0))


def test_which_steps_carry_gradients() -> None:
    rng = SampleRNG(0, [f"0/{i}" for i in range(64)], PROCESSES["epsilon"])
    longalign = schedule("longalign", 50, rng, every=10)
    first = longalign.gradient.float().argmax(0)
    assert set(first.tolist()) == set(range(10)) and (longalign.gradient.sum(0) == 5).all() and not longalign.through
    assert all(longalign.gradient[offset::10, row].all() for row, offset in enumerate(first))
    refl = schedule("refl", 40, rng, last=10)
    assert set(refl.stop.tolist()) == set(range(30, 40)) and (refl.gradient.sum(0) == 1).all()
    assert (schedule("draft", 50, rng, last=3).gradient.sum(1) == torch.tensor([0] * 47 + [64] * 3)).all()
    alignprop = schedule("alignprop", 5, rng)
    assert set(alignprop.gradient.sum(0).tolist()) == {1, 2, 3, 4, 5} and alignprop.through
    assert schedule("draft_lv", 5, rng, last=4).noisings == 4


def test_slopes_of_longaligns_path_are_those_of_its_sampler() -> None:
    """SD1.5 at 50 steps: 1.65 at t = 999, 0.10 at 499, 0.05 at 199 and 0.13 at 19 for the authors' DDIM table."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(50)
    process = type(PROCESSES["epsilon"])(scheduler.alphas_cumprod, "epsilon")
    assert torch.equal(process.sampling_times(50), scheduler.timesteps)
    weights = Sampler(process=process, steps=50, equalise=True).step_weights()
    assert weights[25] / weights[0] == pytest.approx(1.65 / 0.10, rel=0.1)
    assert weights[40] / weights[49] == pytest.approx(0.13 / 0.05, rel=0.2)
    assert sum(1 / weight for weight in weights) / 50 == pytest.approx(1)  # of the mean step nothing changes
    straight = Sampler(process=PROCESSES["flow"], steps=7, equalise=True).step_weights()
    assert straight == pytest.approx([1.0] * 7)  # Euler's steps along a line all have the slope 1/7


def test_defaults_and_sampling_without_gradients() -> None:
    """One step of refl, draft and draft_lv; every tenth of longalign; never more steps than there are."""
    rng = SampleRNG(0, KEYS, PROCESSES["epsilon"])
    assert torch.equal(schedule("longalign", 30, rng).gradient, schedule("longalign", 30, rng, every=10).gradient)
    assert (schedule("refl", 4, rng).stop == 3).all() and schedule("draft_lv", 4, rng).noisings == 1
    assert schedule("draft", 4, rng).gradient.sum(0).tolist() == [1] * 5
    assert 0 <= schedule("refl", 4, rng, last=99).stop.min() < 3
    noise, text, empty = inputs()
    plan = without_gradient(STEPS, noise)
    assert plan.gradient.shape == (STEPS, 5) and not plan.gradient.any() and plan.stop.tolist() == [STEPS - 1] * 5
    process, model = PROCESSES["flow"], toy(torch.tensor([0.3, 0.1], dtype=torch.float64))
    x = noise
    for now, to in ((2000 / 3, 1000 / 3), (1000 / 3, 0)):  # two Euler steps by hand, from the second of three
        x = x + (to - now) / 1000 * model(x, torch.full((5,), now), text)
    plain = Sampler(process=process, steps=STEPS)
    torch.testing.assert_close(plain.sample(model, noise, text, empty, plan, rng, start=1), x)
