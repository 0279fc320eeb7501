"""Noise by inversion, in float64 against plain loops, hand-derived numbers and an ODE with a known solution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipelines import RectifiedFlow, VariancePreserving
from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.inversion import advance, inverted_noise, level_grid
from t2i_align.diffusion.noising import Noised
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from tests.objectives.toy import KINDS, PROCESSES, bounded_model, linear_model, random_batch, rng_for, rows_of

LOG_2 = math.log(2)

GROUPS = 12  # with ten levels, enough for several of them, the first and the last included (asserted where it matters)
# Tables of four and two entries: at the levels 1 and 3 alpha, sigma = 0.8, 0.6 and 0.6, 0.8; at level 0 it is 1, 0.
FOUR = torch.tensor([1.0, 0.64, 0.5, 0.36], dtype=torch.float64)
TWO = torch.tensor([1.0, 0.64], dtype=torch.float64)


def guidable_batch(groups: int = GROUPS) -> Batch:
    empty = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return replace(random_batch(groups), empty={"prompt_embeds": empty})


def per_row(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def coefficients(rng: SampleRNG, noised: Noised) -> tuple[Tensor, Tensor]:
    alpha, sigma = rng.process.alpha_sigma(noised.timesteps)
    return per_row(alpha), per_row(sigma)


def noise_of(rng: SampleRNG, noised: Noised) -> Tensor:
    """The noise that the target stands for."""
    return rng.process.to_noise(noised.target, noised.latents, noised.timesteps)


@pytest.mark.parametrize(
    ("process", "levels", "expected"),
    [
        (PROCESSES["epsilon"], 10, [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]),
        (PROCESSES["v_prediction"], 5, [100, 300, 500, 700, 900]),
        (RectifiedFlow(), 2, [250.0, 750.0]),
        (RectifiedFlow(shift=3.0), 2, [500.0, 900.0]),  # 3/4 / (1 + 2/4) and 9/4 / (1 + 6/4)
        (VariancePreserving(FOUR, "epsilon"), 10, [0, 1, 2, 3]),
    ],
)
def test_grid_points_are_midpoints_of_equal_parts_of_the_training_times(process, levels: int, expected: list) -> None:
    grid = level_grid(SampleRNG(0, ["a"], process), levels)
    assert grid.tolist() == pytest.approx(expected)
    assert grid.dtype == process.timesteps(torch.zeros(1)).dtype


def test_levels_are_uniform_per_group_and_depend_on_seed_and_sample_only() -> None:
    batch = Batch(
        keys=tuple(f"0/{i}" for i in range(2000)), latents=torch.zeros(2000, 2, 1), scores=torch.ones(2000, 2),
        conditioning={},
    )  # fmt: skip
    zero = lambda noisy, timesteps, conditioning: torch.zeros_like(noisy)  # noqa: E731
    times = inverted_noise(zero, batch, rng_for(batch, "epsilon"), levels=5).timesteps.view(2000, 2)
    assert torch.equal(times[:, 0], times[:, 1])
    for level in (100, 300, 500, 700, 900):
        assert (times[:, 0] == level).float().mean().item() == pytest.approx(0.2, abs=0.04)
    alone = inverted_noise(
        zero, rows_of(batch, slice(7, 8)), rng_for(rows_of(batch, slice(7, 8)), "epsilon"), levels=5
    ).timesteps
    assert torch.equal(alone, times[7])


@KINDS
@pytest.mark.parametrize("options", [{}, {"eta": 0.4, "renoise": 2, "guidance": 3.0, "sharing": "independent"}])
def test_latents_timesteps_and_target_agree(kind: str, options: dict) -> None:
    """x_tau = alpha x + sigma noise*, x_tau = x + sigma v* for flow; add_noise and target agree on noise*."""
    batch, (model, _) = guidable_batch(), bounded_model(0)
    rng = rng_for(batch, kind)
    noised = inverted_noise(model, batch, rng, **options)
    clean, noise, (alpha, sigma) = batch.latents.flatten(0, 1), noise_of(rng, noised), coefficients(rng, noised)
    torch.testing.assert_close(alpha * clean + sigma * noise, noised.latents, rtol=1e-12, atol=1e-12)
    if kind == "flow":
        torch.testing.assert_close(clean + sigma * noised.target, noised.latents, rtol=1e-12, atol=1e-12)
    again = rng.process.target(clean, noise, noised.timesteps)
    torch.testing.assert_close(noised.target, again, rtol=1e-9, atol=1e-9)
    assert set(noised.timesteps.tolist()) <= set(level_grid(rng, 10).tolist())
    assert noised.latents.dtype == noised.target.dtype == torch.float64
    assert not (noised.latents.requires_grad or noised.target.requires_grad)


@KINDS
def test_a_batch_of_different_levels_equals_a_plain_loop_of_process_steps(kind: str) -> None:
    """Sample by sample: from the clean latents to the first level, then `ForwardProcess.step` up to its own level."""
    batch, (model, _) = random_batch(GROUPS), bounded_model(0)
    rng = rng_for(batch, kind)
    grid, noised = level_grid(rng, 10), inverted_noise(model, batch, rng)
    assert {grid[0].item(), grid[-1].item()} < set(noised.timesteps.tolist())
    for i in range(2 * GROUPS):
        conditioning = {name: value[i // 2 : i // 2 + 1] for name, value in batch.conditioning.items()}
        clean = batch.latents.flatten(0, 1)[i : i + 1]
        at = torch.zeros_like(grid[:1])
        noise = rng.process.to_noise(model(clean, at, conditioning), clean, at)
        latents, at = rng.process.add_noise(clean, noise, grid[:1]), grid[:1]
        for to in grid[1:][grid[1:] <= noised.timesteps[i]].unbind():
            latents, at = rng.process.step(model(latents, at, conditioning), latents, at, to.view(1)), to.view(1)
        assert at == noised.timesteps[i]
        torch.testing.assert_close(noised.latents[i : i + 1], latents, rtol=1e-12, atol=1e-12)


@KINDS
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_half_precision_predictions_are_combined_in_single_precision(kind: str, guidance: float) -> None:
    """Guidance and averages of half-precision numbers would round again what the model has rounded once."""
    batch = guidable_batch()
    batch = replace(batch, latents=batch.latents.float())

    def half(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return (noisy.sin() + per_row(conditioning["prompt_embeds"].mean((1, 2)))).to(torch.bfloat16)

    found, expected = (
        inverted_noise(model, batch, rng_for(batch, kind), eta=0.5, renoise=1, guidance=guidance)
        for model in (half, lambda *inputs: half(*inputs).float())
    )
    assert found.latents.dtype == found.target.dtype == torch.float32
    assert torch.equal(found.latents, expected.latents) and torch.equal(found.target, expected.target)


def constant_model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    return torch.full_like(noisy, 5.0)


def rising_model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    return per_row(timesteps).to(noisy.dtype) * noisy


def by_hand(process, model: Model, levels: int, at: float, **options) -> tuple[SampleRNG, Noised, Tensor]:
    """One sample inverted to the level `at` (the seed is the first to draw it), and its clean latents."""
    batch = rows_of(random_batch(), slice(1))
    for seed in range(50):
        rng = SampleRNG(seed, batch.keys, process)
        noised = inverted_noise(model, batch, rng, levels=levels, **options)
        if noised.timesteps[0] == at:
            return rng, noised, batch.latents.flatten(0, 1)
    raise AssertionError("no seed draws this level")


@pytest.mark.parametrize(
    ("process", "at", "latents", "target"),
    [
        (VariancePreserving(FOUR, "epsilon"), 1, (0.8, 0.6), (0.0, 1.0)),
        (VariancePreserving(FOUR, "epsilon"), 3, (0.6, 0.8), (0.0, 1.0)),
        (VariancePreserving(FOUR, "v_prediction"), 1, (0.8, 0.6), (-0.6, 0.8)),
        (VariancePreserving(FOUR, "v_prediction"), 3, (0.768, 0.856), (-0.674, 0.642)),
        (RectifiedFlow(), 250, (1.0, 0.25), (0.0, 1.0)),
        (RectifiedFlow(), 750, (1.0, 0.75), (0.0, 1.0)),
    ],
)
def test_two_steps_of_a_constant_prediction_by_hand(process, at, latents, target) -> None:
    """The prediction is c everywhere; alpha, sigma are 1, 0 then 0.8, 0.6 then 0.6, 0.8 (flow: sigma = 1/4, 3/4).

    epsilon  x1 = 0.8 x + 0.6 c; its x_hat = (x1 - 0.6 c) / 0.8 = x again, so x2 = 0.6 x + 0.8 c; noise* = c at both.
    v        at x: noise = 0 x + 1 c, x1 = 0.8 x + 0.6 c; noise* = c, v* = 0.8 c - 0.6 x
             at x1: x_hat = 0.8 x1 - 0.6 c = 0.64 x - 0.12 c, noise = 0.6 x1 + 0.8 c = 0.48 x + 1.16 c
             x2 = 0.6 x_hat + 0.8 noise = (0.384 + 0.384) x + (0.928 - 0.072) c = 0.768 x + 0.856 c
             noise* = (x2 - 0.6 x) / 0.8 = 0.21 x + 1.07 c
             v* = 0.6 noise* - 0.8 x = (0.126 - 0.8) x + 0.642 c
    flow     x1 = x + c / 4, x2 = x1 + c / 2; v* = (x_t - x) / t = c at both.
    """
    _, noised, clean = by_hand(process, constant_model, levels=2, at=at)
    torch.testing.assert_close(noised.latents, latents[0] * clean + latents[1] * 5)
    torch.testing.assert_close(noised.target, target[0] * clean + target[1] * 5)


@pytest.mark.parametrize(
    ("process", "at", "renoise", "factor"),
    [
        (VariancePreserving(TWO, "epsilon"), 1, 0, 0.8),
        (VariancePreserving(TWO, "epsilon"), 1, 1, 1.04),
        (VariancePreserving(TWO, "v_prediction"), 1, 1, 1.136),
        (RectifiedFlow(), 500, 0, 1.0),
        (RectifiedFlow(), 500, 1, 126.0),
        (RectifiedFlow(), 500, 2, 1 + 125 * 126.0),
    ],
)
def test_renoise_by_hand(process, at, renoise: int, factor: float) -> None:
    """One level; the prediction is t times the latents, so at t = 0 it is 0, and again at the old time.

    epsilon  x1 = 0.8 x + 0.6 * 0; at (x1, 1) the noise is 0.8 x; mean 0.4 x; again from x: 0.8 x + 0.6 * 0.4 x = 1.04 x
    v        at x: noise 0, x1 = 0.8 x; at (x1, 1) v = 0.8 x, so x_hat = 0.8 * 0.8 x - 0.6 * 0.8 x = 0.16 x and
             noise = 0.6 * 0.8 x + 0.8 * 0.8 x = 1.12 x, which at alpha, sigma = 1, 0 is v = 1.12 x; mean 0.56 x:
             x1 = 0.8 x + 0.6 * 0.56 x = 1.136 x
    flow     sigma = 1/2, t = 500: x1 = x; at (x1, 500) v = 500 x; mean 250 x; x1 = x + 250 x / 2 = 126 x
             once more: v = 500 * 126 x, mean half of it, x1 = x + 125 * 126 x
    """
    _, noised, clean = by_hand(process, rising_model, levels=1, at=at, renoise=renoise)
    torch.testing.assert_close(noised.latents, factor * clean)


def gaussian_model(process, scale: float) -> Model:
    """The optimal prediction where the data are normal with this standard deviation.

    x_t has variance V = alpha^2 s^2 + sigma^2; given it, E[x] = alpha s^2 x_t / V and E[noise] = sigma x_t / V. The ODE
    keeps each sample's quantile: x_t = x sqrt(V) / s.
    """

    def model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        alpha, sigma = (per_row(value) for value in process.alpha_sigma(timesteps))
        variance = (alpha * scale).square() + sigma.square()
        return process.target(alpha * scale**2 * noisy / variance, sigma * noisy / variance, timesteps)

    return model


def gaussian_inversion(kind: str, scale: float, side: int = 3, groups: int = GROUPS, **options):
    """RNG, noised and clean latents of normal data under their optimal model, and sqrt(V) at the levels."""
    latents = scale * torch.randn(
        groups, 2, 4, side, side, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    batch = replace(random_batch(groups), latents=latents)
    rng = rng_for(batch, kind)
    noised = inverted_noise(gaussian_model(rng.process, scale), batch, rng, **options)
    alpha, sigma = coefficients(rng, noised)
    return rng, noised, latents.flatten(0, 1), ((alpha * scale).square() + sigma.square()).sqrt()


@KINDS
def test_inversion_converges_to_the_exact_ode_and_renoise_reduces_the_error(kind: str) -> None:
    def error(**options) -> float:
        _, noised, clean, deviation = gaussian_inversion(kind, 0.5, **options)
        return (noised.latents / (clean * deviation / 0.5) - 1).abs().max().item()

    coarse, fine, corrected = error(levels=10), error(levels=100), error(levels=10, renoise=1)
    assert fine < 0.05 and fine < coarse / 3
    assert corrected < coarse / 2


@KINDS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_variance_is_that_of_the_forward_process_at_every_eta(kind: str, eta: float) -> None:
    """x_tau / sqrt(V) has variance 1 at every level. With eta = 1 the inverted noise is random: unrelated to the image.

    Noise added on top, with the predicted one in full, would make it about 1 + eta^2. Of 49152 numbers, the variance
    is known to 0.6 % and a correlation to 0.5 %.
    """
    rng, noised, clean, deviation = gaussian_inversion(
        kind, 0.5, side=16, groups=24, levels=100, eta=eta, renoise=1, sharing="independent"
    )
    assert (noised.latents / deviation).var().item() == pytest.approx(1, abs=0.03)
    correlation = torch.corrcoef(torch.stack([noise_of(rng, noised).flatten(), clean.flatten()]))[0, 1].abs().item()
    assert correlation < 0.02 if eta == 1 else correlation > 0.2


@KINDS
def test_step_with_eta_1_is_the_forward_process_for_any_prediction(kind: str) -> None:
    """x_to = (alpha_to / alpha) x_now + sqrt(sigma_to^2 - (alpha_to sigma / alpha)^2) fresh."""
    batch = random_batch()
    rng, latents = rng_for(batch, kind), batch.latents[:, 0]
    now, to = rng.process.timesteps(torch.full((4,), 0.2)), rng.process.timesteps(torch.full((4,), 0.6))
    (a, s), (a_to, s_to) = (map(per_row, rng.process.alpha_sigma(time)) for time in (now, to))
    fresh = batch.latents[:, 1]
    expected = a_to / a * latents + (s_to**2 - (a_to * s / a) ** 2).sqrt() * fresh
    for prediction in (latents.sin(), 3 * fresh):
        moved = advance(rng, prediction, latents, now, to, fresh=fresh, eta=1.0)
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)
        without = advance(rng, prediction, latents, now, to)
        assert torch.equal(advance(rng, prediction, latents, now, to, fresh=fresh), without)  # eta is 0


@KINDS
def test_fresh_noise_is_shared_in_a_pair_or_independent_and_absent_without_eta(kind: str) -> None:
    """Two equal candidates can differ by fresh noise only."""
    batch, (model, _) = random_batch(), bounded_model(0)
    batch = replace(batch, latents=batch.latents[:, :1].expand_as(batch.latents))

    def latents(seed: int = 7, **options) -> Tensor:
        rng = SampleRNG(seed, batch.keys, PROCESSES[kind])
        return inverted_noise(model, batch, rng, levels=1, **options).latents.unflatten(0, (4, 2))

    shared, apart = latents(eta=0.3, sharing="shared"), latents(eta=0.3, sharing="independent")
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert (apart[:, 0] != apart[:, 1]).all()
    assert not torch.equal(shared, latents(seed=8, eta=0.3))
    assert torch.equal(latents(), latents(seed=8, sharing="independent"))


@pytest.mark.parametrize(("options", "calls"), [({}, 1), ({"guidance": 2.0}, 2), ({"renoise": 1}, 2)])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_number_of_network_calls_is_minimal(options: dict, calls: int, seed: int) -> None:
    """At each step the samples that have not reached their level; guidance and each correction take one call more."""
    batch, asked = guidable_batch(groups=2), []
    rng = SampleRNG(seed, batch.keys, PROCESSES["epsilon"])

    def model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        assert len(noisy) == len(timesteps) == len(conditioning["prompt_embeds"])
        asked.append(timesteps.tolist())
        return noisy

    times = inverted_noise(model, batch, rng, **options).timesteps.tolist()
    assert min(times) < max(times)
    expected, now = [], 0
    for to in level_grid(rng, 10).tolist():
        on_the_way = sum(time >= to for time in times)
        expected += [[now] * on_the_way] + [[to if "renoise" in options else now] * on_the_way] * (calls - 1)
        now = to
    assert asked == [call for call in expected if call]


@KINDS
def test_guidance_extrapolates_from_the_empty_prompt(kind: str) -> None:
    """Scale 0 follows the empty prompt alone; a prediction linear in the conditioning makes 2.5 the plain inversion
    under empty + 2.5 (prompt - empty)."""
    batch, (model, _) = guidable_batch(), linear_model(0)
    empty, prompt = batch.empty["prompt_embeds"].expand(GROUPS, 2, 5), batch.conditioning["prompt_embeds"]
    for guidance in (0.0, 2.5):
        mixed = replace(batch, conditioning={"prompt_embeds": empty + guidance * (prompt - empty)})
        found = inverted_noise(model, batch, rng_for(batch, kind), guidance=guidance)
        expected = inverted_noise(model, mixed, rng_for(batch, kind))
        torch.testing.assert_close(found.latents, expected.latents)
        assert found.conditioning["prompt_embeds"].equal(prompt.repeat_interleave(2, dim=0))


def test_guidance_without_the_empty_prompt_is_refused() -> None:
    batch, (model, _) = random_batch(), bounded_model(0)
    with pytest.raises(UserError, match=r"guidance 2\.0 needs the empty prompt"):
        inverted_noise(model, batch, rng_for(batch, "flow"), guidance=2.0)
