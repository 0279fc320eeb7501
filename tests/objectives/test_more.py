"""DSPO, NCP-DPO and SoftREPA: hand-derived numbers, special cases and identities, in float64, forward and backward."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from t2i_align.data.schema import Batch
from t2i_align.diffusion.noising import random_noise, squared_error
from t2i_align.errors import UserError
from t2i_align.objectives import DSPO, NCPDPO, SFT, SoftREPA
from t2i_align.objectives.dspo import dspo_loss
from t2i_align.objectives.guard import safeguard
from t2i_align.objectives.ncp import posterior_step
from t2i_align.objectives.softrepa import contrastive_loss, different_prompts, shifted
from tests.objectives.test_all import row_of
from tests.objectives.test_core import PROCESSES, draw_for, linear_model, random_batch

LOG_2 = math.log(2)


class Perceiving:
    """A stand-in reference: a linear model, with features of its own."""

    def __init__(self, seed: int, identity: bool = False) -> None:
        self.model, self.weight = linear_model(seed)
        self.identity = identity
        self.kernel = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return self.model(noisy, timesteps, conditioning)

    def features(self, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        if self.identity:
            return noisy
        place = conditioning["prompt_embeds"].mean((1, 2)) + timesteps / 1000
        return torch.tanh(torch.einsum("bchw,cd->bdhw", noisy, self.kernel) + place.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(
    "objective",
    [
        DSPO(beta=0.3, logit_beta=5.0),
        DSPO(beta=0.3, logit_beta=5.0, guard=0.5, noise="independent"),
        NCPDPO(beta=50.0),
        NCPDPO(beta=5.0, renoise="uniform", noise="independent", guard=0.5),
    ],
)
def test_a_batch_equals_its_rows_forward_and_backward(kind: str, objective: Any) -> None:
    batch, (policy, weight), reference = random_batch(), linear_model(0), Perceiving(1)
    whole, _ = objective.step(policy, reference, batch, draw_for(batch, kind))
    (whole_grad,) = torch.autograd.grad(whole.sum(), weight)
    assert whole.dtype == torch.float64 and whole_grad.abs().max() > 0
    losses, grads = [], torch.zeros_like(weight)
    for i in range(4):
        row = row_of(batch, i)
        loss, _ = objective.step(policy, reference, row, draw_for(row, kind))
        losses.append(loss)
        grads += torch.autograd.grad(loss.sum(), weight)[0]
    torch.testing.assert_close(whole, torch.cat(losses))
    torch.testing.assert_close(whole_grad, grads, rtol=1e-6, atol=1e-9)


# DSPO ----------------------------------------------------------------------------------------------------------------


def test_dspo_equals_numbers_worked_out_by_hand() -> None:
    """At h = 3 and beta = 1/2 the push is 1/2 sigmoid(-3) = 0.0237129, and prediction minus reference (-0.2, -0.2).

    0.2 + 0.0237129 * 0.2 = 0.2047426 and -0.1 + 0.0047426 = -0.0952574; their mean square is 0.0254968.
    """
    residual_w, ref_residual_w = torch.tensor([[0.2, -0.1]]), torch.tensor([[0.4, 0.1]])
    loss = dspo_loss(residual_w, ref_residual_w, torch.tensor([3.0]), beta=0.5)
    assert loss.item() == pytest.approx(0.0254968, abs=1e-7)


@pytest.mark.parametrize("kind", PROCESSES)
def test_dspo_is_sft_at_the_reference_and_without_a_push(kind: str) -> None:
    batch, (policy, weight), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    sft, _ = SFT().step(policy, policy, batch, draw_for(batch, kind))
    there, metrics = DSPO(beta=0.5).step(policy, policy, batch, draw_for(batch, kind))
    torch.testing.assert_close(there, sft)
    assert (metrics["rewards/accuracies"] == 0.5).all()
    faint, _ = DSPO(beta=1e-9).step(policy, reference, batch, draw_for(batch, kind))
    torch.testing.assert_close(faint, sft, rtol=1e-6, atol=1e-8)
    grads = [torch.autograd.grad(loss.sum(), weight)[0] for loss in (faint, sft)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", PROCESSES)
def test_dspo_is_the_released_formula_with_its_gradient_through_the_logit(kind: str) -> None:
    batch, (policy, weight), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    beta = 0.05
    noised = random_noise(batch, draw_for(batch, kind))
    prediction = policy(noised.latents, noised.timesteps, noised.conditioning)
    other = reference(noised.latents, noised.timesteps, noised.conditioning).detach()
    errors, ref_errors = ((p - noised.target).flatten(1).square().mean(1).view(4, 2) for p in (prediction, other))
    h = -0.5 * beta * ((errors[:, 0] - errors[:, 1]) - (ref_errors[:, 0] - ref_errors[:, 1]))
    winner = (prediction - noised.target)[::2] - beta * (1 - torch.sigmoid(h)).view(-1, 1, 1, 1) * (prediction - other)[
        ::2
    ]
    expected = winner.square().flatten(1).mean(1)
    loss, _ = DSPO(beta=beta).step(policy, reference, batch, draw_for(batch, kind))
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_dspo_teaches_nothing_of_the_loser_where_the_guard_stops_it() -> None:
    """With mu = 1 no part of a loser's gradient passes that points along the winner's: here, of the same image's."""
    batch, (policy, weight), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    batch = replace(batch, latents=batch.latents[:, :1].expand(-1, 2, -1, -1, -1))
    draw = draw_for(batch, "epsilon")
    guarded, _ = DSPO(beta=0.5, logit_beta=50.0, guard=1.0).step(policy, reference, batch, draw)
    noised = random_noise(batch, draw)
    residuals, ref = noised.residuals(policy), noised.residuals(reference).detach()
    err_w, ref_err_w = squared_error(residuals[:, 0]), squared_error(ref[:, 0])
    alone = dspo_loss(
        residuals[:, 0], ref[:, 0], -25.0 * ((err_w - ref_err_w) - (err_w - ref_err_w).detach()), beta=0.5
    )
    assert (safeguard(residuals[:, 0], residuals[:, 1], 1.0) == 0).all()
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (guarded, alone))
    torch.testing.assert_close(ours, theirs)


# NCP-DPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [1, 20, 500, 999])
def test_the_posterior_step_is_the_ddpm_schedulers(kind: str, t: int) -> None:
    process, generator = PROCESSES[kind], torch.Generator().manual_seed(0)
    latents, prediction = torch.randn(2, 1, 4, 3, 3, generator=generator, dtype=torch.float64).unbind(0)
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(1000)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # in float32 it loses four digits at the low end
    expected = scheduler.step(prediction, t, latents, generator=torch.Generator().manual_seed(9)).prev_sample
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    at = torch.tensor([t])
    clean = process.to_clean(prediction, latents, at)
    ours = posterior_step(process, clean, latents, at, at - 1, noise)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(("t", "s"), [(1, 0), (300, 299), (900, 100), (999, 0)])
def test_the_posterior_of_a_noised_image_has_the_marginal_of_the_earlier_time(kind: str, t: int, s: int) -> None:
    """As a linear map: the image's share is alpha_s, the squared shares of both noises add up to sigma_s^2."""
    process, one, zero = PROCESSES[kind], torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    later, earlier = torch.tensor([t]), torch.tensor([s])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(later), process.alpha_sigma(earlier)
    of_image = posterior_step(process, one, alpha_t * one, later, earlier, zero)
    of_noise = posterior_step(process, zero, sigma_t * one, later, earlier, zero)
    of_new_noise = posterior_step(process, zero, zero, later, earlier, one)
    torch.testing.assert_close(of_image, alpha_s.view(1, 1))
    torch.testing.assert_close(of_noise**2 + of_new_noise**2, (sigma_s**2).view(1, 1))


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_posterior_stays_at_time_zero_whatever_the_prediction(kind: str) -> None:
    process, at = PROCESSES[kind], torch.tensor([0])
    latents, prediction, noise = torch.randn(3, 1, 4, 3, 3, dtype=torch.float64).unbind(0)
    clean = process.to_clean(prediction, latents, at)
    torch.testing.assert_close(posterior_step(process, clean, latents, at, at, noise), latents)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("renoise", ["posterior", "uniform"])
def test_ncp_at_the_reference_gives_log_2_and_swapping_negates(kind: str, renoise: str) -> None:
    batch, (policy, _), reference = random_batch(), linear_model(0), Perceiving(0)
    objective = NCPDPO(renoise=renoise)
    loss, metrics = objective.step(policy, reference, batch, draw_for(batch, kind))
    assert (loss == LOG_2).all() and (metrics["rewards/accuracies"] == 0.5).all()
    reference = Perceiving(1)
    swapped = replace(batch, latents=batch.latents.flip(1))
    margins = [objective.step(policy, reference, b, draw_for(b, kind))[1]["rewards/margins"] for b in (batch, swapped)]
    torch.testing.assert_close(margins[0], -margins[1])
    assert margins[0].abs().min() > 0


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("renoise", ["posterior", "uniform"])
def test_ncp_with_features_that_are_the_latents_weighs_the_errors_by_time(kind: str, renoise: str) -> None:
    """A prediction's error moves the clean image by c err, c = -sigma/alpha (noise), -sigma (v and flow), and so

    x_s by (alpha_s - alpha_t sigma_s^2/sigma_t^2 alpha_t/alpha_s) c err      posterior
           (alpha_s c + sigma_s n) err, n = 1 (noise), alpha (v and flow)     uniform
    """
    batch, (policy, _), reference = random_batch(), linear_model(0), Perceiving(1, identity=True)
    draw = draw_for(batch, kind)
    t = draw.timesteps()
    s = draw.process.timesteps(draw.uniform("renoise")) if renoise == "uniform" else (t - 1).clamp_min(0)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = draw.process.alpha_sigma(t), draw.process.alpha_sigma(s)
    c = -sigma_t / alpha_t if kind == "epsilon" else -sigma_t
    if renoise == "uniform":
        moved = alpha_s * c + sigma_s * (1 if kind == "epsilon" else alpha_t)
    else:
        moved = (alpha_s - alpha_t**2 / alpha_s * sigma_s**2 / sigma_t**2) * c
    _, metrics = NCPDPO(renoise=renoise).step(policy, reference, batch, draw)
    plain = random_noise(batch, draw).errors(policy)
    torch.testing.assert_close(metrics["error/chosen"], moved**2 * plain[:, 0], rtol=1e-5, atol=1e-12)


def test_ncp_shares_the_posteriors_noise_between_policy_reference_and_truth() -> None:
    """Three steps from equal points with equal predictions land on one point; another noise would part them."""
    batch, reference = random_batch(), Perceiving(0)
    seen: list[Tensor] = []

    def features(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        seen.append(noisy)
        return noisy

    reference.features = features  # type: ignore[method-assign]
    NCPDPO().step(reference, reference, batch, draw_for(batch, "epsilon"))
    truth, of_reference, of_policy = seen
    assert torch.equal(of_reference, of_policy) and not torch.allclose(truth, of_policy)


# SoftREPA ------------------------------------------------------------------------------------------------------------


def test_the_contrast_equals_numbers_worked_out_by_hand() -> None:
    """Logits 4 exp(-1) = 1.471518 and 4 exp(-3) = 0.199148: loss log(1 + exp(-1.272370)) = 0.246991.

    Equal errors leave log 2; a prompt that is left out leaves 0.
    """
    errors = torch.tensor([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]], dtype=torch.float64)
    other = torch.tensor([[True, True], [True, True], [True, False]])
    loss = contrastive_loss(errors, other, scale=4.0, temperature=0.1)
    assert loss.tolist() == pytest.approx([0.246991, LOG_2, 0.0], abs=1e-6)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("negatives", [None, 2])
def test_softrepa_is_its_formula_on_the_matrix_of_errors(kind: str, negatives: int | None) -> None:
    """Built entry by entry: image i under prompt j, with the time and noise of the first sample."""
    batch, (policy, weight) = random_batch(), linear_model(0)
    draw = draw_for(batch, kind)
    t, noise = draw.timesteps()[:1], draw.normal("noise", batch.latents.shape[2:])[:1].double()
    errors = torch.empty(4, 4, dtype=torch.float64)
    for i in range(4):
        x = batch.latents[i, :1]
        for j in range(4):
            condition = {name: value[j : j + 1] for name, value in batch.conditioning.items()}
            prediction = policy(draw.process.add_noise(x, noise, t), t, condition)
            errors[i, j] = (prediction - draw.process.target(x, noise, t)).square().mean()
    logits = 4 * torch.exp(-errors / 0.5)
    if negatives:  # the next two prompts, around the end
        logits[[0, 1, 2, 3], [3, 0, 1, 2]] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4), reduction="none") + 3 * errors.diag()
    objective = SoftREPA(temperature=0.5, dweight=3.0, negatives=negatives)
    loss, metrics = objective.step(policy, policy, batch, draw)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["error/chosen"], errors.diag().detach(), rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_softrepas_own_temperature_is_the_mean_error_and_carries_no_gradient() -> None:
    batch, (policy, weight) = random_batch(), linear_model(0)
    draw = draw_for(batch, "flow")
    loss, metrics = SoftREPA(dweight=0.0).step(policy, policy, batch, draw)
    # All errors: the chosen ones and, by the mean gap, the others.
    own, others = metrics["error/chosen"], metrics["error/chosen"] + metrics["contrast/gap"]
    mean = ((own + 3 * others) / 4).mean().item()
    fixed, _ = SoftREPA(dweight=0.0, temperature=mean).step(policy, policy, batch, draw)
    torch.testing.assert_close(loss, fixed)
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (loss, fixed))
    torch.testing.assert_close(ours, theirs)


def test_equal_prompts_are_no_negatives() -> None:
    """Samples 0 and 2 share a prompt: one negative fewer for them. If all share it, nothing is left to contrast."""
    batch, (policy, _) = random_batch(), linear_model(0)
    embeds = batch.conditioning["prompt_embeds"].clone()
    embeds[2] = embeds[0]
    other = different_prompts(shifted({"prompt_embeds": embeds}, 3), 4)
    assert other.tolist() == [[True, True, False, True], [True] * 4, [True, True, False, True], [True] * 4]
    same = replace(batch, conditioning={"prompt_embeds": embeds[:1].expand_as(embeds)})
    loss, metrics = SoftREPA(dweight=0.0).step(policy, policy, same, draw_for(same, "epsilon"))
    assert (loss == 0).all() and metrics["contrast/gap"].isnan().all() and metrics["contrast/accuracy"].isnan().all()


def test_prompts_that_differ_in_one_tensor_of_several_are_different() -> None:
    conditioning = {"a": torch.zeros(2, 3), "b": torch.tensor([[0.0], [1.0]])}
    assert different_prompts(shifted(conditioning, 1), 2).all()


def test_softrepa_uses_the_first_samples_draw_and_depends_on_its_batch() -> None:
    batch, (policy, _) = random_batch(), linear_model(0)
    step = lambda b: SoftREPA().step(policy, policy, b, draw_for(b, "epsilon"))[0]  # noqa: E731
    renamed = replace(batch, keys=(batch.keys[0], "0/a", "0/b", "0/c"))
    assert torch.equal(step(batch), step(renamed))
    first_renamed = replace(batch, keys=("0/a", *batch.keys[1:]))
    assert not torch.allclose(step(batch), step(first_renamed))
    half = Batch(
        keys=batch.keys[:2],
        latents=batch.latents[:2],
        scores=batch.scores[:2],
        conditioning={name: value[:2] for name, value in batch.conditioning.items()},
    )
    assert not torch.allclose(step(batch)[:2], step(half))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DSPO, {"beta": 1.0}, r"beta must be a number in \(0, 1\)"),
        (DSPO, {"logit_beta": 0.0}, "logit_beta must be a positive number or null"),
        (DSPO, {"guard": 1.1}, r"guard must be a number in \[0, 1\]"),
        (NCPDPO, {"renoise": "posterio"}, "Did you mean 'posterior'"),
        (NCPDPO, {"beta": 0}, "beta must be a positive number"),
        (SoftREPA, {"temperature": 0.0}, "temperature must be a positive number"),
        (SoftREPA, {"scale": -1.0}, "scale must be a positive number"),
        (SoftREPA, {"dweight": -1.0}, "dweight must be a number of 0 or more"),
        (SoftREPA, {"negatives": 0}, "negatives must be a whole number of at least 1"),
    ],
)
def test_senseless_hyper_parameters_are_refused(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls(**values)


def test_a_batch_of_one_has_nothing_to_contrast() -> None:
    row, (policy, _) = row_of(random_batch(), 0), linear_model(0)
    with pytest.raises(UserError, match=r"train\.batch_size must be 2 or more"):
        SoftREPA().step(policy, policy, row, draw_for(row, "epsilon"))
