"""InPO and SmPO on inverted noise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipelines import VariancePreserving
from t2i_align.diffusion.inversion import inverted_noise, level_grid
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives import DiffusionDPO, InPO, SmPO, get
from t2i_align.objectives.base import DataStats
from t2i_align.objectives.smpo import certainty
from tests.objectives.toy import KINDS, PROCESSES, bounded_model, random_batch, rich_batch, rng_for

LOG_2 = math.log(2)


# InPO -----------------------------------------------------------------------------------------------------------------


@KINDS
def test_inversion_follows_the_chosen_model(kind: str) -> None:
    batch, (policy, _), (reference, _) = random_batch(), bounded_model(0), bounded_model(1)
    for name, followed in (("policy", policy), ("reference", reference)):
        noised = InPO(inversion_model=name).noised(policy, reference, batch, rng_for(batch, kind))
        assert torch.equal(noised.target, inverted_noise(followed, batch, rng_for(batch, kind)).target)
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
    batch, (model, _) = rich_batch(4), bounded_model(0)
    default, found = (
        objective.noised(model, model, batch, rng_for(batch, "epsilon")) for objective in (InPO(), InPO(**fields))
    )
    assert torch.equal(found.target, inverted_noise(model, batch, rng_for(batch, "epsilon"), **options).target)
    assert not torch.equal(found.target, default.target)


@KINDS
def test_inpo_of_the_forward_process_has_the_loss_of_diffusion_dpo_on_the_same_noise(kind: str) -> None:
    """One level and eta = 1: x_tau = alpha x + sigma fresh, which Diffusion-DPO would get from its own rng."""

    class SameNoise(SampleRNG):
        def normal(self, name: str, shape) -> Tensor:
            return super().normal("one name", shape)

        def timesteps(self) -> Tensor:
            return level_grid(self, 1).repeat(len(self.keys))

    batch, (policy, _), (reference, _) = random_batch(), bounded_model(0), bounded_model(1)
    rng = SameNoise(7, batch.keys, PROCESSES[kind])
    inpo, _ = InPO(beta=5.0, levels=1, eta=1.0).step(policy, reference, batch, rng)
    dpo, _ = DiffusionDPO(beta=5.0).step(policy, reference, batch, rng)
    torch.testing.assert_close(inpo, dpo)


def test_inversion_by_the_policy_in_bf16_keeps_its_gradient() -> None:
    """Autocast keeps cast weights: those cast without gradient must not serve the step that trains them."""
    layer = torch.nn.Linear(3, 3)
    policy = lambda noisy, timesteps, conditioning: layer(noisy)  # noqa: E731
    reference = lambda noisy, timesteps, conditioning: noisy  # noqa: E731
    batch = replace(random_batch(), latents=random_batch().latents.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = InPO(inversion_model="policy").step(policy, reference, batch, rng_for(batch, "flow"))
    loss.mean().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_levels_without_signal_or_noise_stay_finite(kind: str) -> None:
    """alpha = 0 at the last of ten levels (zero terminal SNR), sigma = 0 at the first."""
    process = VariancePreserving(torch.linspace(1, 0, 10, dtype=torch.float64), kind)
    batch = rich_batch(40)
    (policy, weight), (reference, _) = bounded_model(0), bounded_model(1)
    rng = SampleRNG(7, batch.keys, process)
    options = {"inversion_guidance": 2.0, "eta": 0.3, "renoise": 1}
    noised = InPO(**options).noised(policy, reference, batch, rng)
    assert {0, 9} < set(noised.timesteps.tolist())
    loss, metrics = InPO(beta=1.0, **options).step(policy, reference, batch, rng)
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    for value in (noised.latents, noised.target, loss, grad, metrics["rewards/margins"]):
        assert value.isfinite().all()
    unseen = noised.timesteps == 9
    expected = -batch.latents.flatten(0, 1) if kind == "v_prediction" else noised.latents
    torch.testing.assert_close(noised.target[unseen], expected[unseen])
    assert torch.equal(noised.latents[noised.timesteps == 0], batch.latents.flatten(0, 1)[noised.timesteps == 0])


# SmPO -----------------------------------------------------------------------------------------------------------------


def test_certainty_by_hand() -> None:
    """Scores 0.3 and 0.1 in a range of 0.1 to 0.5 scale to 0.5 and 0: p = e^0.5 / (e^0.5 + 1) = 0.622459.

    0.5 and 0.1 scale to 1 and 0: p = e / (e + 1) = 0.731059, the most there is; a tie has p = 1/2.
    """
    scores_w, scores_l = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.1, 0.1, 0.2])
    found = certainty(scores_w, scores_l, score_min=0.1, score_max=0.5)
    torch.testing.assert_close(found, 2 * torch.tensor([0.622459, 0.731059, 0.5]) - 1, rtol=1e-5, atol=1e-6)


@KINDS
def test_smpo_equals_inpo_where_gamma_times_certainty_is_1(kind: str) -> None:
    batch, (policy, _), (reference, _) = random_batch(12), bounded_model(0), bounded_model(1)
    gamma = 1 / math.tanh(0.5)  # the scores are 1 and 0
    smpo = SmPO(beta=3.0, gamma=gamma, score_min=0.0, score_max=1.0)
    inpo = InPO(beta=3.0, levels=5, renoise=1)
    losses = [objective.step(policy, reference, batch, rng_for(batch, kind))[0] for objective in (smpo, inpo)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert (losses[0] - math.log(2)).abs().min() > 1e-4


def test_pairs_are_weighted_by_their_scores_and_ties_have_no_gradient() -> None:
    batch, (policy, weight), (reference, _) = random_batch(3), bounded_model(0), bounded_model(1)
    smpo, inpo = SmPO(beta=0.1, score_min=0.0, score_max=2.0), InPO(beta=0.1, levels=5, renoise=1)
    batch = replace(batch, scores=torch.tensor([[2.0, 0.0], [1.0, 0.5], [1.5, 1.5]]))
    margins, plain = (
        objective.step(policy, reference, batch, rng_for(batch, "epsilon"))[1]["rewards/margins"]
        for objective in (smpo, inpo)
    )
    # p = softmax(1, 0), softmax(0.5, 0.25) and 1/2, and gamma = 10
    expected = 10 * torch.tanh(torch.tensor([1.0, 0.25, 0.0]) / 2)
    torch.testing.assert_close((margins / plain).float(), expected)
    loss, _ = smpo.step(policy, reference, batch, rng_for(batch, "epsilon"))
    assert torch.autograd.grad(loss[2], weight, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(loss[1], weight)[0].abs().max() > 0


def test_unset_score_range_is_taken_from_the_data() -> None:
    facts = DataStats(score_range=(0.1, 0.3))
    fit_to_data = SmPO(gamma=7.0).fit_to_data(facts)
    assert (fit_to_data.score_min, fit_to_data.score_max, fit_to_data.gamma) == (0.1, 0.3, 7.0)
    half = SmPO(score_min=-1.0).fit_to_data(facts)
    assert (half.score_min, half.score_max) == (-1.0, 0.3)
    assert InPO().fit_to_data(facts) == InPO()
    with pytest.raises(UserError, match=r"^objective\.score_min must be less than .*_max, found 0\.2 and 0\.2$"):
        SmPO().fit_to_data(DataStats(score_range=(0.2, 0.2)))


@pytest.mark.parametrize("values", [{}, {"score_min": 0.0}, {"score_max": 1.0}])
def test_missing_score_range_is_refused(values: dict) -> None:
    batch, (model, _) = random_batch(), bounded_model(0)
    with pytest.raises(UserError, match=r"^objective\.score_min and .*score_max must be set, or fitted .*data$"):
        SmPO(**values).step(model, model, batch, rng_for(batch, "flow"))


def test_defaults_are_those_of_the_papers() -> None:
    assert (get("inpo"), get("smpo")) == (InPO, SmPO)
    assert (InPO().beta, InPO().levels, InPO().renoise, InPO().eta) == (2000, 10, 0, 0)
    assert (SmPO().beta, SmPO().gamma, SmPO().levels, SmPO().renoise) == (2000, 10, 5, 1)
