"""The forward process: round trips in float64, equality with diffusers' schedulers, and conversions between targets."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from pipelines import RectifiedFlow, VariancePreserving
from pipelines.process import process_of, resolution_shift, scheduler_shift

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True}
ABAR = DDPMScheduler(**BETAS).alphas_cumprod


def process(kind: str):
    return RectifiedFlow() if kind == "flow" else VariancePreserving(ABAR, kind)


def random_point(kind: str, batch: int = 6):
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(batch, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    timesteps = process(kind).timesteps(torch.linspace(0.05, 0.95, batch))
    return latents, noise, timesteps


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_target_gives_back_latents_and_noise(kind: str) -> None:
    p, (latents, noise, t) = process(kind), random_point(kind)
    noisy, target = p.add_noise(latents, noise, t), p.target(latents, noise, t)
    torch.testing.assert_close(p.to_clean(target, noisy, t), latents, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p.to_noise(target, noisy, t), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_step_with_the_true_target_lands_on_the_same_path_in_both_directions(kind: str) -> None:
    p, (latents, noise, t) = process(kind), random_point(kind)
    noisy, target = p.add_noise(latents, noise, t), p.target(latents, noise, t)
    for to in (t.flip(0), torch.zeros_like(t)):
        torch.testing.assert_close(p.step(target, noisy, t, to), p.add_noise(latents, noise, to), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_add_noise_and_step_equal_diffusers_ddim(kind: str) -> None:
    scheduler = DDIMScheduler(**BETAS, prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
    p = VariancePreserving(scheduler.alphas_cumprod, kind)
    latents, noise, _ = (x.float() for x in random_point(kind))
    t = torch.tensor([1, 200, 401, 600, 801, 999])
    torch.testing.assert_close(p.add_noise(latents, noise, t), scheduler.add_noise(latents, noise, t))
    if kind == "v_prediction":
        torch.testing.assert_close(p.target(latents, noise, t), scheduler.get_velocity(latents, noise, t))
    scheduler.set_timesteps(50)
    for now in (981, 501, 41):
        theirs = scheduler.step(noise, now, latents).prev_sample
        when = torch.full((6,), now)
        torch.testing.assert_close(p.step(noise, latents, when, when - 20), theirs, rtol=1e-5, atol=1e-5)


def test_flow_step_equals_diffusers_euler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    latents, velocity, _ = (x.float() for x in random_point("flow"))
    for i in (0, 3, 6):
        scheduler._step_index = None
        now, to = scheduler.timesteps[i], scheduler.timesteps[i + 1]
        theirs = scheduler.step(velocity, now, latents).prev_sample
        ours = RectifiedFlow().step(velocity, latents, now.expand(6), to.expand(6))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_v_prediction_survives_zero_terminal_snr() -> None:
    abar = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True).alphas_cumprod
    p = VariancePreserving(abar, "v_prediction")
    last = torch.tensor([999])
    noise = torch.randn(1, 4, 3, 3)
    assert torch.isfinite(p.to_clean(torch.ones(1, 4, 3, 3), noise, last)).all()
    assert p.alpha_sigma(last)[1].item() == pytest.approx(1.0, abs=1e-6)


def test_timesteps_cover_the_table_uniformly_and_flow_shift_moves_them_to_noise() -> None:
    u = (torch.arange(10_000) + 0.5) / 10_000
    counts = torch.bincount(process("epsilon").timesteps(u), minlength=1000)
    assert counts.min() == counts.max() == 10
    assert process("epsilon").timesteps(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 999]
    plain, shifted = RectifiedFlow().timesteps(u), RectifiedFlow(shift=3).timesteps(u)
    torch.testing.assert_close(plain, 1000 * u)
    assert (shifted > plain).all()
    middle = RectifiedFlow(shift=3).timesteps(torch.tensor([0.5]))  # 3 * 0.5 / (1 + 2 * 0.5) = 0.75
    assert middle.item() == pytest.approx(750)


def test_times_of_an_expert_lie_in_its_span_and_those_of_a_sampler_are_shifted() -> None:
    """A quarter of the way through [0.25, 0.75] is 0.375; a shift of 3 takes 1/4 to 1/2, 1/2 to 3/4, 3/4 to 0.9."""
    assert RectifiedFlow(span=(0.25, 0.75)).timesteps(torch.tensor([0.0, 0.25])).tolist() == [250, 375]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = process_of(scheduler, flow=True).sampling_times(4)
    torch.testing.assert_close(times, torch.tensor([1000.0, 900.0, 750.0, 500.0]).double())
    assert process_of(scheduler, flow=True, span=(0.0, 0.5)).sampling_times(4)[0] == 500


def test_the_shift_of_samplers_is_a_line_through_two_lengths() -> None:
    """FLUX's: e^0.5 at 256 tokens, e^1.15 at 4096, between them the mean of 0.5 and 1.15; Qwen's line is another."""
    assert resolution_shift({}, 256) == pytest.approx(math.exp(0.5))
    assert resolution_shift({}, 4096) == pytest.approx(math.exp(1.15))
    assert resolution_shift({"time_shift_type": "linear"}, 2176) == pytest.approx(0.825)
    line = {"base_image_seq_len": 100, "max_image_seq_len": 300, "base_shift": 1.0, "max_shift": 2.0}
    assert resolution_shift(line, 150) == pytest.approx(math.exp(1.25))
    for config, shift in (({"shift": 3}, 3.0), ({"flow_shift": 5}, 5.0), ({}, 1.0)):
        assert scheduler_shift(config) == shift
        assert scheduler_shift({**config, "use_dynamic_shifting": True}) == 1.0


def test_logit_normal_has_the_quantiles_of_a_logistic_of_a_normal() -> None:
    u = torch.tensor([0.15865525, 0.5, 0.84134475])  # normal quantiles -1, 0, 1
    expected = 1000 * torch.tensor([-1.0, 0.0, 1.0]).sigmoid()
    torch.testing.assert_close(RectifiedFlow().timesteps(u, "logit_normal"), expected, rtol=1e-5, atol=1e-2)
    ends = RectifiedFlow().timesteps(torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64), "logit_normal")
    assert ends.tolist() == pytest.approx(
        [5.4901, 994.5099], abs=1e-3
    )  # the sigmoid of the quantiles of 1e-7, 1 - 1e-7


def test_geometric_times_fall_into_50_bins_whose_share_decays_from_the_noisy_end() -> None:
    """Bin k from the noisy end has 0.9^k (1 - 0.9) / (1 - 0.9^50): 0.10052 for the noisiest, 0.0005757 for the last."""
    u = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    times = RectifiedFlow().timesteps(u, "geometric")
    shares = torch.histc(times, 50, 0, 1000) / len(u)
    expected = 0.9 ** torch.arange(49, -1, -1, dtype=torch.float64) * 0.1 / (1 - 0.9**50)
    assert expected[-1].item() == pytest.approx(0.10052, rel=1e-4)
    torch.testing.assert_close(shares, expected, rtol=2e-3, atol=0)
    noisiest = times[times >= 980]  # jittered: every place in the bin is as likely as every other
    torch.testing.assert_close(torch.histc(noisiest, 4, 980, 1000) / len(noisiest), torch.full((4,), 0.25).double())
    assert (times.diff() > 0).all(), "a quantile function grows"


def test_geometric_times_stay_in_the_table() -> None:
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert process("epsilon").timesteps(edges, "geometric").tolist() == [0, 999]
    flow = RectifiedFlow().timesteps(edges, "geometric")
    assert flow[0].item() == pytest.approx(0, abs=1e-4) and flow[0] >= 0 and 999.9 < flow[1] < 1000


def schedulers() -> list[type[Any]]:
    """Every scheduler of diffusers, but for those of tokens and proteins, and of a table of its own."""
    named = [getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)]  # imported when asked for
    found = [cls for cls in named if isinstance(cls, type) and issubclass(cls, SchedulerMixin)]
    others = ("AmusedScheduler", "RFD4ProteinaScheduler", "UnCLIPScheduler", "VQDiffusionScheduler")
    return [cls for cls in found if hasattr(cls, "from_config") and cls.__name__ not in others]


def test_every_scheduler_has_a_process_or_is_named() -> None:
    """Those with a table of noise levels have it, those of flow matching have their shift; the others are refused."""
    kinds: dict[str, set[str]] = {"table": set(), "flow": set(), "neither": set()}
    for cls in schedulers():
        name, found = cls.__name__, set()
        scheduler = cls.from_config({**BETAS, "num_train_timesteps": 1000})
        for flow in (False, True):
            try:
                process = process_of(scheduler, flow=flow)
            except ValueError as error:
                assert f"found {name}" in str(error)
                continue
            found.add("flow" if flow else "table")
            if isinstance(process, VariancePreserving):
                torch.testing.assert_close(process.alphas_cumprod, scheduler.alphas_cumprod.double())
                assert process.prediction_type == scheduler.config.prediction_type
            else:
                assert isinstance(process, RectifiedFlow) and process.shift == (scheduler.config.get("shift") or 1)
        assert len(found) <= 1
        kinds[next(iter(found), "neither")].add(name)
    assert {"DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler"} <= kinds[
        "table"
    ]
    assert {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"} <= kinds["flow"]
    assert {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"} <= kinds["neither"]


@pytest.mark.parametrize(
    ("cls", "options", "flow", "message"),
    [
        (EulerDiscreteScheduler, {"timestep_type": "continuous", "sigma_max": 120.0}, False, r"\(continuous sigmas\)"),
        (DDIMScheduler, {"prediction_type": "sample"}, False, "DDIMScheduler with 'sample'"),
        (
            UniPCMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            False,
            "found UniPC",
        ),
        (DDIMScheduler, {}, True, "expected a scheduler of flow matching, found DDIMScheduler"),
        (UniPCMultistepScheduler, {}, True, "expected a scheduler of flow matching, found UniPC"),
        (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}, True, "found FlowMatchEuler"),
        (FlowMatchEulerDiscreteScheduler, {"num_train_timesteps": 500}, True, "times of 0 to 1000, found .* with 500"),
    ],
)
def test_schedulers_set_to_another_kind_are_named(
    cls: type[Any], options: dict[str, Any], flow: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        process_of(cls(**options), flow=flow)


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="Choices: uniform, logit_normal, geometric"):
        RectifiedFlow().timesteps(torch.tensor([0.5]), "cosine")
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction'"):
        VariancePreserving(ABAR, "sample")
