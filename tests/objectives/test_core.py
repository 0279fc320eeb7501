"""The equations against hand-derived numbers, and the identities that hold for every forward process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pipelines import RectifiedFlow, VariancePreserving
from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data.loader import open_dataset
from t2i_align.data.schema import Batch
from t2i_align.diffusion.noising import drop_captions, random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives import OBJECTIVES, get
from t2i_align.objectives.base import Requirements
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.objectives.links import link_loss
from t2i_align.objectives.pairwise import dpo_logit
from t2i_align.objectives.sft import SFT
from tests.data.test_examples import StandIn, write_images, write_jsonl

ABAR = DDPMScheduler().alphas_cumprod
PROCESSES = {
    "epsilon": VariancePreserving(ABAR, "epsilon"),
    "v_prediction": VariancePreserving(ABAR, "v_prediction"),
    "flow": RectifiedFlow(),
}


def random_batch(groups: int = 4, k: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(
        keys=tuple(f"0/sample {i}" for i in range(groups)),
        latents=torch.randn(groups, k, 4, 3, 3, generator=generator, dtype=torch.float64),
        scores=torch.tensor([[1.0] + [0.0] * (k - 1)] * groups),
        conditioning={"prompt_embeds": torch.randn(groups, 2, 5, generator=generator, dtype=torch.float64)},
    )


def linear_model(seed: int):
    """A model with a parameter, whose output depends on latents, time and conditioning of its own row alone."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def model(noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        mixed = torch.einsum("bchw,cd->bdhw", noisy, weight)
        bias = conditioning["prompt_embeds"].mean((1, 2)) + timesteps / 1000
        return mixed + bias.view(-1, 1, 1, 1)

    return model, weight


def draw_for(batch: Batch, process: str) -> SampleRNG:
    return SampleRNG(7, batch.keys, PROCESSES[process])


def test_dpo_equals_numbers_worked_out_by_hand() -> None:
    """s_w = 0.10 - 0.12 = -0.02, s_l = 0.20 - 0.15 = 0.05; h = -1/2 * 100 * (-0.02 - 0.05) = 3.5.

    loss = log(1 + exp(-3.5)) = 0.029750; the second pair is the first with winner and loser exchanged, h = -3.5.
    """
    err_w, err_l = torch.tensor([0.10, 0.20]), torch.tensor([0.20, 0.10])
    ref_w, ref_l = torch.tensor([0.12, 0.15]), torch.tensor([0.15, 0.12])
    h = dpo_logit(err_w, err_l, ref_w, ref_l, beta=100)
    torch.testing.assert_close(h, torch.tensor([3.5, -3.5]))
    torch.testing.assert_close(link_loss(h), torch.tensor([0.0297504, 3.5297504]))


def test_links_equal_numbers_worked_out_by_hand() -> None:
    """At h = log 3: s(h) = 3/4, s(-h) = 1/4, so -log s(h) = log(4/3) and -log s(-h) = log 4; with eps = 0.1:

    cDPO 0.9 log(4/3) + 0.1 log 4 = 0.397543; rDPO (0.9 log(4/3) - 0.1 log 4) / 0.8 = 0.150355.
    """
    h = torch.tensor(math.log(3.0), dtype=torch.float64)
    cdpo = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    rdpo = (0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8
    assert link_loss(h).item() == pytest.approx(math.log(4 / 3))
    assert link_loss(h, label_smoothing=0.1).item() == pytest.approx(cdpo) == pytest.approx(0.397543, abs=1e-6)
    assert link_loss(h, link="robust", label_smoothing=0.1).item() == pytest.approx(rdpo)
    assert rdpo == pytest.approx(0.150355, abs=1e-6)
    assert link_loss(torch.tensor([0.25, 2.0]), link="hinge").tolist() == [0.75, 0.0]
    assert link_loss(torch.tensor([0.5, 2.5]), link="ipo").tolist() == [0.0, 4.0]


def test_cdpo_optimum_and_rdpo_unbiasedness() -> None:
    """cDPO is least at h = log((1 - eps)/eps); rDPO averaged over flipped labels is the clean loss."""
    h = torch.tensor(math.log(0.8 / 0.2), dtype=torch.float64, requires_grad=True)
    link_loss(h, label_smoothing=0.2).backward()
    assert h.grad.item() == pytest.approx(0, abs=1e-12)
    h = torch.linspace(-3, 3, 7, dtype=torch.float64)
    kept, flipped = (link_loss(sign * h, link="robust", label_smoothing=0.3) for sign in (1, -1))
    torch.testing.assert_close(0.7 * kept + 0.3 * flipped, link_loss(h))


@pytest.mark.parametrize("kind", PROCESSES)
def test_policy_equal_to_reference_gives_exactly_log_2(kind: str) -> None:
    batch, (model, _) = random_batch(), linear_model(0)
    loss, metrics = DiffusionDPO(beta=5000).step(model, model, batch, draw_for(batch, kind))
    assert (loss == math.log(2)).all()
    assert (metrics["rewards/accuracies"] == 0.5).all()


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("objective", [DiffusionDPO(beta=3.0), DiffusionDPO(beta=3.0, noise="independent"), SFT()])
def test_a_batch_equals_its_rows_one_at_a_time_forward_and_backward(kind: str, objective) -> None:
    batch = random_batch()
    (policy, weight), (reference, _) = linear_model(0), linear_model(1)
    whole, _ = objective.step(policy, reference, batch, draw_for(batch, kind))
    (whole_grad,) = torch.autograd.grad(whole.sum(), weight)
    losses, grads = [], torch.zeros_like(weight)
    for i in range(4):
        row = Batch(
            keys=batch.keys[i : i + 1],
            latents=batch.latents[i : i + 1],
            scores=batch.scores[i : i + 1],
            conditioning={name: value[i : i + 1] for name, value in batch.conditioning.items()},
        )
        loss, _ = objective.step(policy, reference, row, draw_for(row, kind))
        losses.append(loss)
        grads += torch.autograd.grad(loss.sum(), weight)[0]
    torch.testing.assert_close(whole, torch.cat(losses))
    torch.testing.assert_close(whole_grad, grads, rtol=1e-4, atol=1e-5)


def test_swapping_the_pair_negates_every_margin() -> None:
    batch, (policy, _), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    swapped = replace(batch, latents=batch.latents.flip(1))
    margins = [
        DiffusionDPO(beta=10.0).step(policy, reference, b, draw_for(b, "epsilon"))[1]["rewards/margins"]
        for b in (batch, swapped)
    ]
    torch.testing.assert_close(margins[0], -margins[1])
    assert margins[0].abs().min() > 0


def test_sum_reduction_is_mean_times_the_number_of_elements() -> None:
    batch, (policy, _), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    elements = batch.latents[0, 0].numel()
    by_sum, _ = DiffusionDPO(beta=1.0, reduction="sum").step(policy, reference, batch, draw_for(batch, "flow"))
    by_mean, _ = DiffusionDPO(beta=float(elements)).step(policy, reference, batch, draw_for(batch, "flow"))
    torch.testing.assert_close(by_sum, by_mean)


def test_gradient_lowers_winner_error_and_raises_loser_error() -> None:
    """d loss / d err_w > 0 and d loss / d err_l < 0, equal and opposite."""
    errors = [torch.tensor([0.1], requires_grad=True), torch.tensor([0.1], requires_grad=True)]
    link_loss(dpo_logit(*errors, torch.tensor([0.1]), torch.tensor([0.1]), beta=4.0)).backward()
    assert errors[0].grad.item() == pytest.approx(1.0) == -errors[1].grad.item()  # 1/2 beta * sigmoid(0)


def test_noise_is_shared_or_independent_as_asked_and_time_is_one_a_group() -> None:
    batch = replace(random_batch(), latents=torch.zeros(4, 3, 4, 3, 3))
    shared = random_noise(batch, draw_for(batch, "epsilon"), "shared")
    apart = random_noise(batch, draw_for(batch, "epsilon"), "independent")
    for noised, equal in ((shared, True), (apart, False)):
        target = noised.target.view(4, 3, -1)
        assert torch.equal(target[:, 0], target[:, 1]) is equal
        times = noised.timesteps.view(4, 3)
        assert (times == times[:, :1]).all()
    assert not torch.equal(shared.target[0], shared.target[3])


def test_captions_are_dropped_for_whole_groups_and_at_the_asked_rate() -> None:
    batch = replace(random_batch(), keys=tuple(f"0/{i}" for i in range(2000)))
    batch = replace(
        batch, latents=torch.zeros(2000, 2, 1, 1, 1), conditioning={"prompt_embeds": torch.ones(2000, 2, 5)}
    )
    empty = {"prompt_embeds": torch.zeros(1, 2, 5)}
    dropped = drop_captions(batch, empty, draw_for(batch, "flow"), 0.2).conditioning["prompt_embeds"]
    rows = dropped.mean((1, 2))
    assert set(rows.tolist()) == {0.0, 1.0}
    assert (rows == 0).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_half_precision_predictions_are_squared_in_float32() -> None:
    batch = random_batch()
    noised = random_noise(batch, draw_for(batch, "epsilon"))
    errors = noised.errors(lambda x, t, c: noised.target.to(torch.bfloat16))
    assert errors.dtype == torch.float32
    expected = (noised.target.to(torch.bfloat16).float() - noised.target.float()).square().flatten(1).mean(1)
    torch.testing.assert_close(errors.flatten(), expected)


def test_sft_is_the_winners_error_whatever_the_loser() -> None:
    """A model that predicts zero has the error mean(target^2) on each candidate; SFT's loss is the first one's."""
    batch = random_batch()
    zero = lambda noisy, timesteps, conditioning: torch.zeros_like(noisy)  # noqa: E731
    target = random_noise(batch, draw_for(batch, "flow")).target.unflatten(0, (4, 2))
    loss, _ = SFT().step(zero, zero, batch, draw_for(batch, "flow"))
    torch.testing.assert_close(loss, target[:, 0].square().flatten(1).mean(1))
    worse = replace(batch, latents=torch.cat([batch.latents[:, :1], 9 * batch.latents[:, 1:]], dim=1))
    assert torch.equal(SFT().step(zero, zero, worse, draw_for(worse, "flow"))[0], loss)


@pytest.mark.parametrize("cache", [True, False])
def test_sft_leaves_out_what_was_disliked_and_counts_it(cache: bool, tmp_path: Path) -> None:
    """Scores 1, -1, 0, 2, -3 of single images: the first and the fourth were liked; a limit counts liked ones."""
    write_images(tmp_path, ["a.jpg"])
    data = write_jsonl(
        tmp_path / "likes.jsonl",
        [{"prompt": "p", "images": ["a.jpg"], "scores": [score]} for score in (1, -1, 0, 2, -3)],
    )

    def counts(needs: Requirements, limit: int | None = None) -> dict[str, int]:
        return open_dataset(
            DataConfig(path=str(data), cache=cache, limit=limit),
            ModelConfig(path="a model"),
            needs=needs,
            pipeline=StandIn,
            encoder_fingerprint=lambda: "e",
            size=(8, 8),
            cache_root=tmp_path / "cache",
            progress=False,
        ).counts

    assert counts(SFT.needs) == {"groups": 2, "skipped": 0, "disliked_left_out": 3}
    assert counts(SFT.needs, limit=2) == {"groups": 2, "skipped": 0, "disliked_left_out": 2}
    assert counts(Requirements()) == {"groups": 5, "skipped": 0}
    data.write_text(json.dumps({"prompt": "p", "images": ["a.jpg"], "scores": [-1]}) + "\n")
    with pytest.raises(UserError, match="no group is left: of 1, 0 are ties, 1 are disliked"):
        counts(SFT.needs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "beta must be a positive number"),
        ({"beta": -1.0}, "beta must be a positive number"),
        ({"beta": float("nan")}, "beta must be a positive number"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be a number in \[0, 0.5\)"),
        ({"link": "hinge", "label_smoothing": 0.1}, "no meaning with link 'hinge'"),
        ({"link": "sigmod"}, "Did you mean 'sigmoid'"),
    ],
)
def test_senseless_hyper_parameters_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiffusionDPO(**values)


def test_unknown_objective_answers_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown objective 'difusion_dpo'. Did you mean 'diffusion_dpo'.*sft"):
        get("difusion_dpo")
    assert all(get(name).name == name and get(name).paper for name in OBJECTIVES)
