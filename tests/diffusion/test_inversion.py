"""Inversion noising, InPO and SmPO, in float64 against plain loops, hand-derived numbers and an exactly known ODE."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipelines import RectifiedFlow, VariancePreserving
from t2i_align.data.schema import Batch, Model
from t2i_align.diffusion.inversion import advance, inverted_noise, level_grid
from t2i_align.diffusion.noising import Noised
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives import get
from t2i_align.objectives.base import DataStats
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.objectives.inpo import InPO
from t2i_align.objectives.smpo import SmPO, certainty
from tests.objectives.test_core import PROCESSES, draw_for, linear_model, random_batch

KINDS = pytest.mark.parametrize("kind", PROCESSES)
GROUPS = 12  # with ten levels, enough for several of them, the first and the last included (asserted where it matters)
# Tables of four and two entries: at the levels 1 and 3 alpha, sigma = 0.8, 0.6 and 0.6, 0.8; at level 0 it is 1, 0.
FOUR = torch.tensor([1.0, 0.64, 0.5, 0.36], dtype=torch.float64)
TWO = torch.tensor([1.0, 0.64], dtype=torch.float64)


def guidable_batch(groups: int = GROUPS) -> Batch:
    empty = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return replace(random_batch(groups), empty={"prompt_embeds": empty})


def row(batch: Batch, i: int) -> Batch:
    return replace(
        batch,
        keys=batch.keys[i : i + 1],
        latents=batch.latents[i : i + 1],
        scores=batch.scores[i : i + 1],
        conditioning={name: value[i : i + 1] for name, value in batch.conditioning.items()},
    )


def bounded_model(seed: int) -> tuple[Model, Tensor]:
    """`linear_model` with outputs in (-1, 1): its matrix would grow latents a hundredfold over ten steps."""
    model, weight = linear_model(seed)
    return lambda noisy, timesteps, conditioning: torch.tanh(model(noisy, timesteps, conditioning)), weight


def per_row(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def coefficients(draw: SampleRNG, noised: Noised) -> tuple[Tensor, Tensor]:
    alpha, sigma = draw.process.alpha_sigma(noised.timesteps)
    return per_row(alpha), per_row(sigma)


def noise_of(draw: SampleRNG, noised: Noised) -> Tensor:
    """The noise that the target stands for."""
    return draw.process.to_noise(noised.target, noised.latents, noised.timesteps)


# Levels, and what is at them --------------------------------------------------------------------------------------


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
def test_the_grid_is_the_middles_of_equal_parts_of_the_training_times(process, levels: int, expected: list) -> None:
    grid = level_grid(SampleRNG(0, ["a"], process), levels)
    assert grid.tolist() == pytest.approx(expected)
    assert grid.dtype == process.timesteps(torch.zeros(1)).dtype


def test_levels_are_uniform_one_a_group_and_depend_on_seed_and_sample_only() -> None:
    batch = Batch(
        keys=tuple(f"0/{i}" for i in range(2000)), latents=torch.zeros(2000, 2, 1), scores=torch.ones(2000, 2),
        conditioning={},
    )  # fmt: skip
    zero = lambda noisy, timesteps, conditioning: torch.zeros_like(noisy)  # noqa: E731
    times = inverted_noise(zero, batch, draw_for(batch, "epsilon"), levels=5).timesteps.view(2000, 2)
    assert torch.equal(times[:, 0], times[:, 1])
    for level in (100, 300, 500, 700, 900):
        assert (times[:, 0] == level).float().mean().item() == pytest.approx(0.2, abs=0.04)
    alone = inverted_noise(zero, row(batch, 7), draw_for(row(batch, 7), "epsilon"), levels=5).timesteps
    assert torch.equal(alone, times[7])


@KINDS
@pytest.mark.parametrize("options", [{}, {"eta": 0.4, "renoise": 2, "guidance": 3.0, "sharing": "independent"}])
def test_latents_timesteps_and_target_agree(kind: str, options: dict) -> None:
    """x_tau = alpha x + sigma noise*, x_tau = x + sigma v* for flow; add_noise and target say the same of noise*."""
    batch, (model, _) = guidable_batch(), bounded_model(0)
    draw = draw_for(batch, kind)
    noised = inverted_noise(model, batch, draw, **options)
    clean, noise, (alpha, sigma) = batch.latents.flatten(0, 1), noise_of(draw, noised), coefficients(draw, noised)
    torch.testing.assert_close(alpha * clean + sigma * noise, noised.latents, rtol=1e-12, atol=1e-12)
    if kind == "flow":
        torch.testing.assert_close(clean + sigma * noised.target, noised.latents, rtol=1e-12, atol=1e-12)
    again = draw.process.target(clean, noise, noised.timesteps)
    torch.testing.assert_close(noised.target, again, rtol=1e-9, atol=1e-9)
    assert set(noised.timesteps.tolist()) <= set(level_grid(draw, 10).tolist())
    assert noised.latents.dtype == noised.target.dtype == torch.float64
    assert not (noised.latents.requires_grad or noised.target.requires_grad)


@KINDS
def test_a_batch_of_different_levels_equals_a_plain_loop_of_process_steps(kind: str) -> None:
    """Sample by sample: from the clean latents to the first level, then `ForwardProcess.step` up to its own level."""
    batch, (model, _) = random_batch(GROUPS), bounded_model(0)
    draw = draw_for(batch, kind)
    grid, noised = level_grid(draw, 10), inverted_noise(model, batch, draw)
    assert {grid[0].item(), grid[-1].item()} < set(noised.timesteps.tolist())
    for i in range(2 * GROUPS):
        conditioning = {name: value[i // 2 : i // 2 + 1] for name, value in batch.conditioning.items()}
        clean = batch.latents.flatten(0, 1)[i : i + 1]
        at = torch.zeros_like(grid[:1])
        noise = draw.process.to_noise(model(clean, at, conditioning), clean, at)
        latents, at = draw.process.add_noise(clean, noise, grid[:1]), grid[:1]
        for to in grid[1:][grid[1:] <= noised.timesteps[i]].unbind():
            latents, at = draw.process.step(model(latents, at, conditioning), latents, at, to.view(1)), to.view(1)
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
        inverted_noise(model, batch, draw_for(batch, kind), eta=0.5, renoise=1, guidance=guidance)
        for model in (half, lambda *inputs: half(*inputs).float())
    )
    assert found.latents.dtype == found.target.dtype == torch.float32
    assert torch.equal(found.latents, expected.latents) and torch.equal(found.target, expected.target)


# Numbers worked out by hand ---------------------------------------------------------------------------------------


def constant_model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    return torch.full_like(noisy, 5.0)


def rising_model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    return per_row(timesteps).to(noisy.dtype) * noisy


def by_hand(process, model: Model, levels: int, at: float, **options) -> tuple[SampleRNG, Noised, Tensor]:
    """One sample inverted to the level `at` (the seed is the first to draw it), and its clean latents."""
    batch = row(random_batch(), 0)
    for seed in range(50):
        draw = SampleRNG(seed, batch.keys, process)
        noised = inverted_noise(model, batch, draw, levels=levels, **options)
        if noised.timesteps[0] == at:
            return draw, noised, batch.latents.flatten(0, 1)
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
def test_two_steps_of_a_constant_prediction_equal_numbers_worked_out_by_hand(process, at, latents, target) -> None:
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
def test_renoise_equals_numbers_worked_out_by_hand(process, at, renoise: int, factor: float) -> None:
    """One level; the prediction is t times the latents, so at t = 0 it is 0, and asked again at the old time, too.

    epsilon  x1 = 0.8 x + 0.6 * 0; at (x1, 1) the noise is 0.8 x; mean 0.4 x; again from x: 0.8 x + 0.6 * 0.4 x = 1.04 x
    v        at x: noise 0, x1 = 0.8 x; at (x1, 1) v = 0.8 x, so x_hat = 0.8 * 0.8 x - 0.6 * 0.8 x = 0.16 x and
             noise = 0.6 * 0.8 x + 0.8 * 0.8 x = 1.12 x, which at alpha, sigma = 1, 0 is v = 1.12 x; mean 0.56 x:
             x1 = 0.8 x + 0.6 * 0.56 x = 1.136 x
    flow     sigma = 1/2, t = 500: x1 = x; at (x1, 500) v = 500 x; mean 250 x; x1 = x + 250 x / 2 = 126 x
             once more: v = 500 * 126 x, mean half of it, x1 = x + 125 * 126 x
    """
    _, noised, clean = by_hand(process, rising_model, levels=1, at=at, renoise=renoise)
    torch.testing.assert_close(noised.latents, factor * clean)


# An ODE that is known exactly -------------------------------------------------------------------------------------


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
    """Draw, noised and clean latents of normal data under the model that suits them, and sqrt(V) at the levels."""
    latents = scale * torch.randn(
        groups, 2, 4, side, side, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    batch = replace(random_batch(groups), latents=latents)
    draw = draw_for(batch, kind)
    noised = inverted_noise(gaussian_model(draw.process, scale), batch, draw, **options)
    alpha, sigma = coefficients(draw, noised)
    return draw, noised, latents.flatten(0, 1), ((alpha * scale).square() + sigma.square()).sqrt()


@KINDS
def test_inversion_converges_to_the_exact_ode_and_renoise_brings_it_nearer(kind: str) -> None:
    def error(**options) -> float:
        _, noised, clean, deviation = gaussian_inversion(kind, 0.5, **options)
        return (noised.latents / (clean * deviation / 0.5) - 1).abs().max().item()

    coarse, fine, corrected = error(levels=10), error(levels=100), error(levels=10, renoise=1)
    assert fine < 0.05 and fine < coarse / 3
    assert corrected < coarse / 2


@KINDS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_variance_is_the_processs_at_every_eta(kind: str, eta: float) -> None:
    """x_tau / sqrt(V) has variance 1 at every level. With eta = 1 the noise found is random: unrelated to the image.

    Noise added on top, with the predicted one in full, would make it about 1 + eta^2. Of 49152 numbers, the variance
    is known to 0.6 % and a correlation to 0.5 %.
    """
    draw, noised, clean, deviation = gaussian_inversion(
        kind, 0.5, side=16, groups=24, levels=100, eta=eta, renoise=1, sharing="independent"
    )
    assert (noised.latents / deviation).var().item() == pytest.approx(1, abs=0.03)
    correlation = torch.corrcoef(torch.stack([noise_of(draw, noised).flatten(), clean.flatten()]))[0, 1].abs().item()
    assert correlation < 0.02 if eta == 1 else correlation > 0.2


@KINDS
def test_a_step_with_eta_1_is_the_forward_process_whatever_the_prediction(kind: str) -> None:
    """x_to = (alpha_to / alpha) x_now + sqrt(sigma_to^2 - (alpha_to sigma / alpha)^2) fresh."""
    batch = random_batch()
    draw, latents = draw_for(batch, kind), batch.latents[:, 0]
    now, to = draw.process.timesteps(torch.full((4,), 0.2)), draw.process.timesteps(torch.full((4,), 0.6))
    (a, s), (a_to, s_to) = (map(per_row, draw.process.alpha_sigma(time)) for time in (now, to))
    fresh = batch.latents[:, 1]
    expected = a_to / a * latents + (s_to**2 - (a_to * s / a) ** 2).sqrt() * fresh
    for prediction in (latents.sin(), 3 * fresh):
        moved = advance(draw, prediction, latents, now, to, fresh=fresh, eta=1.0)
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@KINDS
def test_fresh_noise_is_shared_in_a_pair_or_independent_and_absent_without_eta(kind: str) -> None:
    """With two equal candidates, all that can tell them apart is fresh noise."""
    batch, (model, _) = random_batch(), bounded_model(0)
    batch = replace(batch, latents=batch.latents[:, :1].expand_as(batch.latents))

    def latents(seed: int = 7, **options) -> Tensor:
        draw = SampleRNG(seed, batch.keys, PROCESSES[kind])
        return inverted_noise(model, batch, draw, levels=1, **options).latents.unflatten(0, (4, 2))

    shared, apart = latents(eta=0.3, sharing="shared"), latents(eta=0.3, sharing="independent")
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert (apart[:, 0] != apart[:, 1]).all()
    assert not torch.equal(shared, latents(seed=8, eta=0.3))
    assert torch.equal(latents(), latents(seed=8, sharing="independent"))


# Calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "calls"), [({}, 1), ({"guidance": 2.0}, 2), ({"renoise": 1}, 2)])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_no_call_is_made_in_vain(options: dict, calls: int, seed: int) -> None:
    """As many steps as the deepest level of the batch takes; guidance and each correction take one call more."""
    batch, asked = guidable_batch(groups=2), []
    draw = SampleRNG(seed, batch.keys, PROCESSES["epsilon"])

    def model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        assert len(noisy) == len(timesteps) == len(conditioning["prompt_embeds"]) == 4
        asked.append(timesteps.tolist())
        return noisy

    noised = inverted_noise(model, batch, draw, **options)
    deepest = level_grid(draw, 10).tolist().index(noised.timesteps.max()) + 1
    assert deepest < 10
    assert len(asked) == calls * deepest
    assert asked[0] == [0] * 4
    assert max(asked) == [noised.timesteps.max() if "renoise" in options else 100 * (deepest - 1) - 50] * 4


@KINDS
def test_guidance_extrapolates_from_the_empty_prompt(kind: str) -> None:
    """Scale 0 follows the empty prompt alone; a prediction linear in the conditioning makes 2.5 the plain inversion
    under empty + 2.5 (prompt - empty)."""
    batch, (model, _) = guidable_batch(), linear_model(0)
    empty, prompt = batch.empty["prompt_embeds"].expand(GROUPS, 2, 5), batch.conditioning["prompt_embeds"]
    for guidance in (0.0, 2.5):
        mixed = replace(batch, conditioning={"prompt_embeds": empty + guidance * (prompt - empty)})
        found = inverted_noise(model, batch, draw_for(batch, kind), guidance=guidance)
        expected = inverted_noise(model, mixed, draw_for(batch, kind))
        torch.testing.assert_close(found.latents, expected.latents)
        assert found.conditioning["prompt_embeds"].equal(prompt.repeat_interleave(2, dim=0))


def test_guidance_without_the_empty_prompt_is_refused() -> None:
    batch, (model, _) = random_batch(), bounded_model(0)
    with pytest.raises(UserError, match=r"guidance 2\.0 needs the empty prompt"):
        inverted_noise(model, batch, draw_for(batch, "flow"), guidance=2.0)


# InPO -------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("model", ["reference", "policy"])
def test_policy_equal_to_reference_gives_exactly_log_2(kind: str, model: str) -> None:
    batch, (policy, _) = random_batch(GROUPS), bounded_model(0)
    loss, _ = InPO(inversion_model=model).step(policy, policy, batch, draw_for(batch, kind))
    assert (loss == math.log(2)).all()


@KINDS
@pytest.mark.parametrize(
    "objective",
    [
        InPO(beta=3.0),
        InPO(beta=3.0, inversion_model="policy", eta=0.3, noise="independent"),
        SmPO(beta=3.0, inversion_guidance=2.0, score_min=0.0, score_max=1.0),
    ],
    ids=["inpo", "inpo of all options", "smpo"],
)
def test_a_batch_equals_its_rows_one_at_a_time_forward_and_backward(kind: str, objective: InPO) -> None:
    batch = guidable_batch()
    batch = replace(batch, scores=torch.linspace(0, 1, GROUPS).unsqueeze(1) * batch.scores)
    (policy, weight), (reference, _) = bounded_model(0), bounded_model(1)
    assert len(objective.noised(policy, reference, batch, draw_for(batch, kind)).timesteps.unique()) > 3
    whole, _ = objective.step(policy, reference, batch, draw_for(batch, kind))
    (whole_grad,) = torch.autograd.grad(whole.sum(), weight)
    assert whole_grad.abs().max() > 0.01
    losses, grads = [], torch.zeros_like(weight)
    for i in range(GROUPS):
        loss, _ = objective.step(policy, reference, row(batch, i), draw_for(row(batch, i), kind))
        losses.append(loss)
        grads += torch.autograd.grad(loss.sum(), weight)[0]
    torch.testing.assert_close(whole, torch.cat(losses))
    torch.testing.assert_close(whole_grad, grads)


@KINDS
def test_the_chosen_model_is_followed(kind: str) -> None:
    batch, (policy, _), (reference, _) = random_batch(), bounded_model(0), bounded_model(1)
    for name, followed in (("policy", policy), ("reference", reference)):
        noised = InPO(inversion_model=name).noised(policy, reference, batch, draw_for(batch, kind))
        assert torch.equal(noised.target, inverted_noise(followed, batch, draw_for(batch, kind)).target)
    assert InPO().inversion_model == "reference"


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"levels": 4}, {"levels": 4}),
        ({"inversion_guidance": 2.0}, {"guidance": 2.0}),
        ({"renoise": 2}, {"renoise": 2}),
        ({"eta": 0.3}, {"eta": 0.3}),
        ({"eta": 0.3, "noise": "independent"}, {"eta": 0.3, "sharing": "independent"}),
    ],
)
def test_every_field_reaches_the_inversion(fields: dict, options: dict) -> None:
    batch, (model, _) = guidable_batch(4), bounded_model(0)
    default, found = (
        objective.noised(model, model, batch, draw_for(batch, "epsilon")) for objective in (InPO(), InPO(**fields))
    )
    assert torch.equal(found.target, inverted_noise(model, batch, draw_for(batch, "epsilon"), **options).target)
    assert not torch.equal(found.target, default.target)


@KINDS
def test_inpo_of_the_forward_process_has_the_loss_of_diffusion_dpo_on_the_same_noise(kind: str) -> None:
    """One level and eta = 1: x_tau = alpha x + sigma fresh, which Diffusion-DPO would get from its own draw."""

    class SameNoise(SampleRNG):
        def normal(self, name: str, shape) -> Tensor:
            return super().normal("one name", shape)

        def timesteps(self) -> Tensor:
            return level_grid(self, 1).repeat(len(self.keys))

    batch, (policy, _), (reference, _) = random_batch(), bounded_model(0), bounded_model(1)
    draw = SameNoise(7, batch.keys, PROCESSES[kind])
    inpo, _ = InPO(beta=5.0, levels=1, eta=1.0).step(policy, reference, batch, draw)
    dpo, _ = DiffusionDPO(beta=5.0).step(policy, reference, batch, draw)
    torch.testing.assert_close(inpo, dpo)


def test_following_the_policy_in_bf16_does_not_cost_its_gradient() -> None:
    """Autocast keeps cast weights: those cast without gradient must not serve the step that trains them."""
    layer = torch.nn.Linear(3, 3)
    policy = lambda noisy, timesteps, conditioning: layer(noisy)  # noqa: E731
    reference = lambda noisy, timesteps, conditioning: noisy  # noqa: E731
    batch = replace(random_batch(), latents=random_batch().latents.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = InPO(inversion_model="policy").step(policy, reference, batch, draw_for(batch, "flow"))
    loss.mean().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_last_level_without_signal_and_a_first_without_noise_stay_finite(kind: str) -> None:
    """alpha = 0 at the last of ten levels (zero terminal SNR), sigma = 0 at the first."""
    process = VariancePreserving(torch.linspace(1, 0, 10, dtype=torch.float64), kind)
    batch = guidable_batch(groups=40)
    (policy, weight), (reference, _) = bounded_model(0), bounded_model(1)
    draw = SampleRNG(7, batch.keys, process)
    options = {"inversion_guidance": 2.0, "eta": 0.3, "renoise": 1}
    noised = InPO(**options).noised(policy, reference, batch, draw)
    assert {0, 9} < set(noised.timesteps.tolist())
    loss, metrics = InPO(beta=1.0, **options).step(policy, reference, batch, draw)
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    for value in (noised.latents, noised.target, loss, grad, metrics["rewards/margins"]):
        assert value.isfinite().all()
    unseen = noised.timesteps == 9
    expected = -batch.latents.flatten(0, 1) if kind == "v_prediction" else noised.latents
    torch.testing.assert_close(noised.target[unseen], expected[unseen])
    assert torch.equal(noised.latents[noised.timesteps == 0], batch.latents.flatten(0, 1)[noised.timesteps == 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": 0}, "levels must be a whole number of at least 1"),
        ({"inversion_model": "polcy"}, "Did you mean 'policy'"),
        ({"eta": 1.1}, r"eta must be a number in \[0, 1\]"),
        ({"renoise": -1}, "renoise must be a whole number of 0 or more"),
        ({"beta": 0.0}, "beta must be a positive number"),
    ],
)
def test_senseless_hyper_parameters_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InPO(**values)


# SmPO -------------------------------------------------------------------------------------------------------------


def test_certainty_equals_numbers_worked_out_by_hand() -> None:
    """Scores 0.3 and 0.1 in a range of 0.1 to 0.5 scale to 0.5 and 0: p = e^0.5 / (e^0.5 + 1) = 0.622459.

    0.5 and 0.1 scale to 1 and 0: p = e / (e + 1) = 0.731059, the most there is; a tie has p = 1/2.
    """
    scores_w, scores_l = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.1, 0.1, 0.2])
    found = certainty(scores_w, scores_l, score_min=0.1, score_max=0.5)
    torch.testing.assert_close(found, 2 * torch.tensor([0.622459, 0.731059, 0.5]) - 1, rtol=1e-5, atol=1e-6)


@KINDS
def test_smpo_equals_inpo_where_gamma_times_certainty_is_1(kind: str) -> None:
    batch, (policy, _), (reference, _) = random_batch(GROUPS), bounded_model(0), bounded_model(1)
    gamma = 1 / math.tanh(0.5)  # the scores are 1 and 0
    smpo = SmPO(beta=3.0, gamma=gamma, score_min=0.0, score_max=1.0)
    inpo = InPO(beta=3.0, levels=5, renoise=1)
    losses = [objective.step(policy, reference, batch, draw_for(batch, kind))[0] for objective in (smpo, inpo)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert (losses[0] - math.log(2)).abs().min() > 1e-4


def test_each_pair_counts_by_its_own_scores_and_a_tie_teaches_nothing() -> None:
    batch, (policy, weight), (reference, _) = random_batch(3), bounded_model(0), bounded_model(1)
    smpo, inpo = SmPO(beta=0.1, score_min=0.0, score_max=2.0), InPO(beta=0.1, levels=5, renoise=1)
    batch = replace(batch, scores=torch.tensor([[2.0, 0.0], [1.0, 0.5], [1.5, 1.5]]))
    margins, plain = (
        objective.step(policy, reference, batch, draw_for(batch, "epsilon"))[1]["rewards/margins"]
        for objective in (smpo, inpo)
    )
    # p = softmax(1, 0), softmax(0.5, 0.25) and 1/2, and gamma = 10
    expected = 10 * torch.tanh(torch.tensor([1.0, 0.25, 0.0]) / 2)
    torch.testing.assert_close((margins / plain).float(), expected)
    loss, _ = smpo.step(policy, reference, batch, draw_for(batch, "epsilon"))
    assert torch.autograd.grad(loss[2], weight, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(loss[1], weight)[0].abs().max() > 0


def test_the_range_of_scores_is_the_datas_where_it_is_left_open() -> None:
    facts = DataStats(score_range=(0.1, 0.3))
    fit_to_data = SmPO(gamma=7.0).fit_to_data(facts)
    assert (fit_to_data.score_min, fit_to_data.score_max, fit_to_data.gamma) == (0.1, 0.3, 7.0)
    half = SmPO(score_min=-1.0).fit_to_data(facts)
    assert (half.score_min, half.score_max) == (-1.0, 0.3)
    assert InPO().fit_to_data(facts) == InPO()
    with pytest.raises(UserError, match=r"score_min must be less than .*, found 0\.2 and 0\.2"):
        SmPO().fit_to_data(DataStats(score_range=(0.2, 0.2)))


@pytest.mark.parametrize("values", [{}, {"score_min": 0.0}, {"score_max": 1.0}])
def test_a_missing_range_of_scores_is_refused(values: dict) -> None:
    batch, (model, _) = random_batch(), bounded_model(0)
    with pytest.raises(UserError, match=r"score_min and .*score_max must be set"):
        SmPO(**values).step(model, model, batch, draw_for(batch, "flow"))


def test_defaults_are_the_papers_and_both_are_found_by_name() -> None:
    assert (get("inpo"), get("smpo")) == (InPO, SmPO)
    assert (InPO().beta, InPO().levels, InPO().renoise, InPO().eta) == (2000, 10, 0, 0)
    assert (SmPO().beta, SmPO().gamma, SmPO().levels, SmPO().renoise) == (2000, 10, 5, 1)
