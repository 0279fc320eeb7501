"""DSPO, NCP-DPO and SoftREPA: hand-derived numbers, special cases, and their released formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from t2i_align.data.batch import Batch
from t2i_align.diffusion.noising import random_noise, squared_error
from t2i_align.errors import UserError
from t2i_align.objectives import DSPO, NCPDPO, SFT, SoftREPA
from t2i_align.objectives.dspo import dspo_loss
from t2i_align.objectives.ncp import posterior_step
from t2i_align.objectives.pairwise import safeguard
from t2i_align.objectives.softrepa import contrastive_loss, different_prompts, shifted
from tests.objectives.toy import KINDS, PROCESSES, FeatureReference, linear_model, random_batch, rng_for, rows_of

LOG_2 = math.log(2)


# DSPO -----------------------------------------------------------------------------------------------------------------


def test_dspo_by_hand() -> None:
    """At h = 3 and beta = 1/2 the push is 1/2 sigmoid(-3) = 0.0237129, and prediction minus reference (-0.2, -0.2).

    0.2 + 0.0237129 * 0.2 = 0.2047426 and -0.1 + 0.0047426 = -0.0952574; their mean square is 0.0254968.
    """
    residual_w, ref_residual_w = torch.tensor([[0.2, -0.1]]), torch.tensor([[0.4, 0.1]])
    loss = dspo_loss(residual_w, ref_residual_w, torch.tensor([3.0]), beta=0.5)
    assert loss.item() == pytest.approx(0.0254968, abs=1e-7)


@KINDS
def test_dspo_is_sft_at_the_reference_and_for_vanishing_beta(kind: str) -> None:
    batch, (policy, weight), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    sft, _ = SFT().step(policy, policy, batch, rng_for(batch, kind))
    there, metrics = DSPO(beta=0.5).step(policy, policy, batch, rng_for(batch, kind))
    torch.testing.assert_close(there, sft)
    assert (metrics["rewards/accuracies"] == 0.5).all()
    faint, _ = DSPO(beta=1e-9).step(policy, reference, batch, rng_for(batch, kind))
    torch.testing.assert_close(faint, sft, rtol=1e-6, atol=1e-8)
    grads = [torch.autograd.grad(loss.sum(), weight)[0] for loss in (faint, sft)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


@KINDS
def test_dspo_is_the_released_formula_with_its_gradient_through_the_logit(kind: str) -> None:
    batch, (policy, weight), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    beta = 0.05
    noised = random_noise(batch, rng_for(batch, kind))
    prediction = policy(noised.latents, noised.timesteps, noised.conditioning)
    other = reference(noised.latents, noised.timesteps, noised.conditioning).detach()
    errors, ref_errors = ((p - noised.target).flatten(1).square().mean(1).view(4, 2) for p in (prediction, other))
    h = -0.5 * beta * ((errors[:, 0] - errors[:, 1]) - (ref_errors[:, 0] - ref_errors[:, 1]))
    winner = (prediction - noised.target)[::2] - beta * (1 - torch.sigmoid(h)).view(-1, 1, 1, 1) * (prediction - other)[
        ::2
    ]
    expected = winner.square().flatten(1).mean(1)
    loss, _ = DSPO(beta=beta).step(policy, reference, batch, rng_for(batch, kind))
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_dspo_has_no_gradient_from_a_loser_stopped_by_the_guard() -> None:
    """With mu = 1 no part of a loser's gradient passes that points along the winner's: here, of the same image's."""
    batch, (policy, weight), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    batch = replace(batch, latents=batch.latents[:, :1].expand(-1, 2, -1, -1, -1))
    rng = rng_for(batch, "epsilon")
    guarded, _ = DSPO(beta=0.5, logit_beta=50.0, guard=1.0).step(policy, reference, batch, rng)
    noised = random_noise(batch, rng)
    residuals, ref = noised.residuals(policy), noised.residuals(reference).detach()
    err_w, ref_err_w = squared_error(residuals[:, 0]), squared_error(ref[:, 0])
    alone = dspo_loss(
        residuals[:, 0], ref[:, 0], -25.0 * ((err_w - ref_err_w) - (err_w - ref_err_w).detach()), beta=0.5
    )
    assert (safeguard(residuals[:, 0], residuals[:, 1], 1.0) == 0).all()
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (guarded, alone))
    torch.testing.assert_close(ours, theirs)


# NCP-DPO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [1, 20, 500, 999])
def test_posterior_step_is_the_ddpm_schedulers(kind: str, t: int) -> None:
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


@KINDS
@pytest.mark.parametrize(("t", "s"), [(1, 0), (300, 299), (900, 100), (999, 0)])
def test_posterior_of_a_noised_image_has_the_marginal_of_the_earlier_time(kind: str, t: int, s: int) -> None:
    """As a linear map: the image's share is alpha_s, the squared shares of both noises add up to sigma_s^2."""
    process, one, zero = PROCESSES[kind], torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    later, earlier = torch.tensor([t]), torch.tensor([s])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(later), process.alpha_sigma(earlier)
    of_image = posterior_step(process, one, alpha_t * one, later, earlier, zero)
    of_noise = posterior_step(process, zero, sigma_t * one, later, earlier, zero)
    of_new_noise = posterior_step(process, zero, zero, later, earlier, one)
    torch.testing.assert_close(of_image, alpha_s.view(1, 1))
    torch.testing.assert_close(of_noise**2 + of_new_noise**2, (sigma_s**2).view(1, 1))


@KINDS
def test_posterior_stays_at_time_zero(kind: str) -> None:
    process, at = PROCESSES[kind], torch.tensor([0])
    latents, prediction, noise = torch.randn(3, 1, 4, 3, 3, dtype=torch.float64).unbind(0)
    clean = process.to_clean(prediction, latents, at)
    torch.testing.assert_close(posterior_step(process, clean, latents, at, at, noise), latents)


@KINDS
@pytest.mark.parametrize("renoise", ["posterior", "uniform"])
def test_ncp_with_features_that_are_the_latents_weighs_the_errors_by_time(kind: str, renoise: str) -> None:
    """A prediction's error moves the clean image by c err, c = -sigma/alpha (noise), -sigma (v and flow), and so

    x_s by (alpha_s - alpha_t sigma_s^2/sigma_t^2 alpha_t/alpha_s) c err      posterior
           (alpha_s c + sigma_s n) err, n = 1 (noise), alpha (v and flow)     uniform
    """
    batch, (policy, _), reference = random_batch(), linear_model(0), FeatureReference(1, identity=True)
    rng = rng_for(batch, kind)
    t = rng.timesteps()
    s = rng.process.timesteps(rng.uniform("renoise")) if renoise == "uniform" else (t - 1).clamp_min(0)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rng.process.alpha_sigma(t), rng.process.alpha_sigma(s)
    c = -sigma_t / alpha_t if kind == "epsilon" else -sigma_t
    if renoise == "uniform":
        moved = alpha_s * c + sigma_s * (1 if kind == "epsilon" else alpha_t)
    else:
        moved = (alpha_s - alpha_t**2 / alpha_s * sigma_s**2 / sigma_t**2) * c
    _, metrics = NCPDPO(renoise=renoise).step(policy, reference, batch, rng)
    plain = random_noise(batch, rng).errors(policy)
    torch.testing.assert_close(metrics["error/chosen"], moved**2 * plain[:, 0], rtol=1e-5, atol=1e-12)


def test_ncp_shares_the_posteriors_noise_between_policy_reference_and_truth() -> None:
    """Three steps from equal points with equal predictions land on one point; another noise would part them."""
    batch, reference = random_batch(), FeatureReference(0)
    seen: list[Tensor] = []

    def features(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        seen.append(noisy)
        return noisy

    reference.features = features  # type: ignore[method-assign]
    NCPDPO().step(reference, reference, batch, rng_for(batch, "epsilon"))
    truth, of_reference, of_policy = seen
    assert torch.equal(of_reference, of_policy) and not torch.allclose(truth, of_policy)


# SoftREPA -------------------------------------------------------------------------------------------------------------


def test_contrast_by_hand() -> None:
    """Logits 4 exp(-1) = 1.471518 and 4 exp(-3) = 0.199148: loss log(1 + exp(-1.272370)) = 0.246991.

    Equal errors leave log 2; a prompt that is left out leaves 0.
    """
    errors = torch.tensor([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]], dtype=torch.float64)
    other = torch.tensor([[True, True], [True, True], [True, False]])
    loss = contrastive_loss(errors, other, scale=4.0, temperature=0.1)
    assert loss.tolist() == pytest.approx([0.246991, LOG_2, 0.0], abs=1e-6)


@KINDS
@pytest.mark.parametrize("negatives", [None, 2])
def test_softrepa_is_its_formula_on_the_matrix_of_errors(kind: str, negatives: int | None) -> None:
    """Built entry by entry: image i under prompt j, with the time and noise of the first sample."""
    batch, (policy, weight) = random_batch(), linear_model(0)
    rng = rng_for(batch, kind)
    t, noise = rng.timesteps()[:1], rng.normal("noise", batch.latents.shape[2:])[:1].double()
    errors = torch.empty(4, 4, dtype=torch.float64)
    for i in range(4):
        x = batch.latents[i, :1]
        for j in range(4):
            condition = {name: value[j : j + 1] for name, value in batch.conditioning.items()}
            prediction = policy(rng.process.add_noise(x, noise, t), t, condition)
            errors[i, j] = (prediction - rng.process.target(x, noise, t)).square().mean()
    logits = 4 * torch.exp(-errors / 0.5)
    if negatives:  # the next two prompts, around the end
        logits[[0, 1, 2, 3], [3, 0, 1, 2]] = -torch.inf
    contrast = torch.nn.functional.cross_entropy(logits, torch.arange(4), reduction="none")
    expected = contrast + 3 * errors.diag()
    objective = SoftREPA(temperature=0.5, dweight=3.0, negatives=negatives)
    loss, metrics = objective.step(policy, policy, batch, rng)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["contrast/loss"], contrast.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["error/chosen"], errors.diag().detach(), rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_default_temperature_is_the_mean_error_without_gradient() -> None:
    batch, (policy, weight) = random_batch(), linear_model(0)
    rng = rng_for(batch, "flow")
    loss, metrics = SoftREPA(dweight=0.0).step(policy, policy, batch, rng)
    # All errors: the chosen ones and, by the mean gap, the others.
    own, others = metrics["error/chosen"], metrics["error/chosen"] + metrics["contrast/gap"]
    mean = ((own + 3 * others) / 4).mean().item()
    fixed, _ = SoftREPA(dweight=0.0, temperature=mean).step(policy, policy, batch, rng)
    torch.testing.assert_close(loss, fixed)
    ours, theirs = (torch.autograd.grad(value.sum(), weight)[0] for value in (loss, fixed))
    torch.testing.assert_close(ours, theirs)


def test_equal_prompts_are_not_negatives() -> None:
    """Samples 0 and 2 share a prompt: one negative fewer for them. If all share it, there are no negatives."""
    batch, (policy, _) = random_batch(), linear_model(0)
    embeds = batch.conditioning["prompt_embeds"].clone()
    embeds[2] = embeds[0]
    other = different_prompts(shifted({"prompt_embeds": embeds}, 3), 4)
    assert other.tolist() == [[True, True, False, True], [True] * 4, [True, True, False, True], [True] * 4]
    same = replace(batch, conditioning={"prompt_embeds": embeds[:1].expand_as(embeds)})
    loss, metrics = SoftREPA(dweight=0.0).step(policy, policy, same, rng_for(same, "epsilon"))
    assert (loss == 0).all() and metrics["contrast/gap"].isnan().all() and metrics["contrast/accuracy"].isnan().all()


def test_prompts_that_differ_in_one_tensor_of_several_are_different() -> None:
    conditioning = {"a": torch.zeros(2, 3), "b": torch.tensor([[0.0], [1.0]])}
    assert different_prompts(shifted(conditioning, 1), 2).all()


def test_softrepa_shares_the_first_samples_noise_and_depends_on_its_batch() -> None:
    batch, (policy, _) = random_batch(), linear_model(0)
    step = lambda b: SoftREPA().step(policy, policy, b, rng_for(b, "epsilon"))[0]  # noqa: E731
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


def test_batch_of_one_is_refused() -> None:
    row, (policy, _) = rows_of(random_batch(), slice(1)), linear_model(0)
    with pytest.raises(UserError, match=r"^objective softrepa contrasts .*: train\.batch_size must be 2 or more$"):
        SoftREPA().step(policy, policy, row, rng_for(row, "epsilon"))
