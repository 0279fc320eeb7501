"""Methods on pairs: the logit, the links, the guard, and what each method changes, against hand-derived numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_align.diffusion.noising import random_noise
from t2i_align.errors import UserError
from t2i_align.objectives import DCPO, LCPO, SFT, TDPO, DiffusionDPO, DiffusionLPO, RankDPO
from t2i_align.objectives.base import Requirements
from t2i_align.objectives.diffusion_dpo import dpo_logit, link_loss
from t2i_align.objectives.dmpo import dmpo_loss
from t2i_align.objectives.lcpo import trust
from t2i_align.objectives.mapo import mapo_loss, shrinking
from t2i_align.objectives.pairwise import by_time, safeguard, scale_gradient
from tests.data.test_examples import write_images, write_jsonl
from tests.data.test_loader import opened
from tests.objectives.toy import (
    KINDS,
    assert_equal_objectives,
    linear_model,
    loss_and_gradient,
    random_batch,
    rich_batch,
    rng_for,
    same_captions,
)

LOG_2 = math.log(2)


# Logit and links ------------------------------------------------------------------------------------------------------


def test_dpo_logit_by_hand() -> None:
    """s_w = 0.10 - 0.12 = -0.02, s_l = 0.20 - 0.15 = 0.05; h = -1/2 * 100 * (-0.02 - 0.05) = 3.5.

    loss = log(1 + exp(-3.5)) = 0.029750; the second pair is the first with winner and loser exchanged, h = -3.5.
    """
    err_w, err_l = torch.tensor([0.10, 0.20]), torch.tensor([0.20, 0.10])
    ref_w, ref_l = torch.tensor([0.12, 0.15]), torch.tensor([0.15, 0.12])
    h = dpo_logit(err_w, err_l, ref_w, ref_l, beta=100)
    torch.testing.assert_close(h, torch.tensor([3.5, -3.5]))
    torch.testing.assert_close(link_loss(h), torch.tensor([0.0297504, 3.5297504]))


def test_links_by_hand() -> None:
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


def test_cdpo_is_minimal_at_its_flip_rate_and_rdpo_is_unbiased() -> None:
    """cDPO is least at h = log((1 - eps)/eps); rDPO averaged over flipped labels is the clean loss."""
    h = torch.tensor(math.log(0.8 / 0.2), dtype=torch.float64, requires_grad=True)
    link_loss(h, label_smoothing=0.2).backward()
    assert h.grad.item() == pytest.approx(0, abs=1e-12)
    h = torch.linspace(-3, 3, 7, dtype=torch.float64)
    kept, flipped = (link_loss(sign * h, link="robust", label_smoothing=0.3) for sign in (1, -1))
    torch.testing.assert_close(0.7 * kept + 0.3 * flipped, link_loss(h))


def test_sum_reduction_is_mean_times_the_number_of_elements() -> None:
    batch, (policy, _), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    elements = batch.latents[0, 0].numel()
    by_sum, _ = DiffusionDPO(beta=1.0, reduction="sum").step(policy, reference, batch, rng_for(batch, "flow"))
    by_mean, _ = DiffusionDPO(beta=float(elements)).step(policy, reference, batch, rng_for(batch, "flow"))
    torch.testing.assert_close(by_sum, by_mean)


def test_gradient_lowers_winner_error_and_raises_loser_error() -> None:
    """d loss / d err_w > 0 and d loss / d err_l < 0, equal and opposite."""
    errors = [torch.tensor([0.1], requires_grad=True), torch.tensor([0.1], requires_grad=True)]
    link_loss(dpo_logit(*errors, torch.tensor([0.1]), torch.tensor([0.1]), beta=4.0)).backward()
    assert errors[0].grad.item() == pytest.approx(1.0) == -errors[1].grad.item()  # 1/2 beta * sigmoid(0)


@KINDS
@pytest.mark.parametrize(
    "objective",
    [
        DCPO(beta=3.0),
        DiffusionLPO(beta=3.0),
        RankDPO(beta=3.0, noise="shared"),
        DiffusionDPO(beta=3.0, link="robust"),
        DiffusionDPO(beta=3.0, guard=0.0),
    ],
    ids=["dcpo", "lpo", "rankdpo", "robust", "guard"],
)
def test_special_cases_are_diffusion_dpo(kind: str, objective) -> None:
    """Equal captions; lists of two (weight 1); a flip rate of 0; a guard that passes the whole gradient."""
    batch = same_captions(random_batch())
    if objective.name == "diffusion_dpo" and objective.guard is not None:
        # mu = 0 passes min(1, |g_w|^2 / <g_l, g_w>): 1 wherever the loser's gradient is the shorter one along g_w.
        batch = replace(batch, latents=batch.latents * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1))
        noised = [loss_and_gradient(o, batch, kind) for o in (objective, DiffusionDPO(beta=3.0))]
        shares = noised[0][2]["guard/passing"]
        assert ((shares > 0) & (shares <= 1)).all()
        torch.testing.assert_close(noised[0][0], noised[1][0])  # values are never changed, only gradients
        return
    assert_equal_objectives(objective, DiffusionDPO(beta=3.0), batch, kind)


# Guard, automatic beta, metrics ---------------------------------------------------------------------------------------


def test_guard_by_hand() -> None:
    """g_w = (2, 0), mu = 1/2. g_l = (4, 3): <g_l, g_w> = 8, |g_w|^2 = 4, share 1/2 * 4/8 = 1/4; g_l = (-1, 0): all;

    g_l = (0.1, 0): 1/2 * 4/0.2 = 10, capped at 1; g_l orthogonal: all."""
    g_w = torch.tensor([[2.0, 0.0]]).expand(4, 2)
    g_l = torch.tensor([[4.0, 3.0], [-1.0, 0.0], [0.1, 0.0], [0.0, 5.0]])
    torch.testing.assert_close(safeguard(g_w, g_l, 0.5), torch.tensor([0.25, 1.0, 1.0, 1.0]))
    value = torch.tensor([2.0], requires_grad=True)
    scaled = scale_gradient(value**2, torch.tensor([0.25]))
    scaled.backward()
    assert scaled.item() == 4.0 and value.grad.item() == 1.0  # 0.25 * 2 * 2


def test_guard_bounds_the_winners_error_to_first_order() -> None:
    """Along -(g_w - share g_l), the winner's error falls: g_w . (g_w - share g_l) >= mu |g_w|^2 >= 0."""
    generator = torch.Generator().manual_seed(0)
    g_w, g_l = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 4.0]).view(2, 1, 1)
    share = safeguard(g_w, g_l, 0.3).unsqueeze(1)
    gain = (g_w * (g_w - share * g_l)).sum(1)
    assert (gain >= 0.3 * g_w.square().sum(1) - 1e-9).all()
    assert ((g_w * (g_w - g_l)).sum(1) < 0).any()  # without the guard it would rise for at least one


def test_beta_follows_the_gradient_factor() -> None:
    """Factor 0.5 against a target of 0.4 raises beta by exp(0.5 * 0.1); at the target it stays; step uses it."""
    objective = DiffusionDPO(beta=10.0, target_gradient=0.4)
    state = {"beta": torch.tensor(objective.initial_state()["beta"])}
    raised = objective.update_state(state, {"rewards/gradient_factor": torch.tensor(0.5)})
    assert raised["beta"].item() == pytest.approx(10 * math.exp(0.05))
    assert objective.update_state(state, {"rewards/gradient_factor": torch.tensor(0.4)})[
        "beta"
    ].item() == pytest.approx(10)
    batch = replace(random_batch(), state=raised)
    assert_equal_objectives(objective, DiffusionDPO(beta=raised["beta"].item()), batch, "epsilon")


def test_drift_is_the_mean_squared_difference_of_the_predictions() -> None:
    batch, (policy, _), (reference, _) = random_batch(), linear_model(0), linear_model(1)
    noised = random_noise(batch, rng_for(batch, "flow"))
    ours, theirs = (model(noised.latents, noised.timesteps, noised.conditioning) for model in (policy, reference))
    _, metrics = DiffusionDPO().step(policy, reference, batch, rng_for(batch, "flow"))
    torch.testing.assert_close(metrics["drift"], (ours - theirs).detach().square().reshape(4, -1).mean(1))


def test_margins_are_split_by_time_and_add_up() -> None:
    batch = random_batch(64)
    _, _, metrics = loss_and_gradient(DiffusionDPO(beta=3.0), batch, "flow")
    quarters = torch.stack([value for name, value in metrics.items() if name.startswith("rewards/margins/t")])
    assert len(quarters) == 4 and ((~quarters.isnan()).sum(0) == 1).all()
    names = {f"rewards/margins/{quarter}" for quarter in ("t0-250", "t250-500", "t500-750", "t750-1000")}
    assert names == {name for name in metrics if name.startswith("rewards/margins/t")}
    torch.testing.assert_close(quarters.nansum(0), metrics["rewards/margins"])
    times = rng_for(batch, "flow").timesteps()
    assert torch.equal(~quarters[0].isnan(), times < 250) and torch.equal(~quarters[3].isnan(), times >= 750)
    ends = by_time("m", torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1000.0]))  # both ends of the flow's schedule
    assert ends["m/t0-250"].nansum() == 1 and ends["m/t750-1000"].nansum() == 2


# DCPO, TDPO, DMPO, LCPO, MaPO, SFT ------------------------------------------------------------------------------------


@KINDS
def test_dcpo_denoises_each_candidate_under_its_own_caption(kind: str) -> None:
    """Exchanging candidates together with captions negates the margin; exchanging captions alone does not."""
    batch = rich_batch()
    flipped = {"captions": {"prompt_embeds": batch.captions["prompt_embeds"].flip(1)}}
    both = replace(batch, latents=batch.latents.flip(1), columns=flipped)
    margins = [
        loss_and_gradient(DCPO(beta=3.0), b, kind)[2]["rewards/margins"]
        for b in (batch, both, replace(batch, columns=flipped))
    ]
    torch.testing.assert_close(margins[0], -margins[1])
    assert (margins[0] - margins[2]).abs().min() > 1e-6 and (margins[0] + margins[2]).abs().min() > 1e-6


@KINDS
def test_tdpo_with_equal_texts_has_no_gradient(kind: str) -> None:
    """Both sides are the same error, so h = 0 and its gradient vanishes for any policy (below the limit)."""
    loss, gradient, _ = loss_and_gradient(TDPO(limit=1e9), same_captions(random_batch()), kind)
    torch.testing.assert_close(loss, torch.full_like(loss, LOG_2))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_tdpo_stops_rewarding_the_negative_beyond_its_limit() -> None:
    """s- = 0.05 against a limit of 0.01: h = -1/2 beta (0 - 0.01) = 5 at beta 1000, with no gradient on err_l."""
    err_l = torch.tensor([0.15], requires_grad=True)
    flat = torch.tensor([0.10])
    h = TDPO(beta=1000.0, limit=0.01).logit(flat, err_l, flat, flat, 1000.0)
    h.backward()
    assert h.item() == pytest.approx(5.0) and err_l.grad.item() == 0


def test_dmpo_vanishes_at_its_optimum_and_equals_the_kl_divergence() -> None:
    """KL(1/2 || 0.9, 0.1) = 1/2 log(1/2 / 0.9) + 1/2 log(1/2 / 0.1) = 0.5108256."""
    best = torch.tensor(math.log(9.0), dtype=torch.float64, requires_grad=True)
    loss = dmpo_loss(best, alpha=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and best.grad.item() == pytest.approx(0, abs=1e-12)
    assert dmpo_loss(torch.tensor(0.0), alpha=0.1).item() == pytest.approx(0.5108256)


def test_lcpo_weights_follow_bayes_and_update_their_mean() -> None:
    """h = log 3, eta = 0.8: p = 3/4, w = 0.6/(0.6 + 0.05) = 12/13; eta' = 0.8 + 0.1 (12/13 - 0.8)."""
    w = trust(torch.tensor(math.log(3.0), requires_grad=True), 0.8)
    assert w.item() == pytest.approx(12 / 13) and not w.requires_grad
    objective = LCPO(eta=0.8, rate=0.1)
    state = {"eta": torch.tensor(objective.initial_state()["eta"], dtype=torch.float64)}
    state = objective.update_state(state, {"lcpo/trust": w})
    assert state["eta"].item() == pytest.approx(0.8 + 0.1 * (12 / 13 - 0.8))
    adapted = LCPO(beta=10.0, target_gradient=0.4)  # beside eta, beta follows the gradient factor
    state = {name: torch.tensor(value) for name, value in adapted.initial_state().items()}
    state = adapted.update_state(state, {"lcpo/trust": w, "rewards/gradient_factor": torch.tensor(0.5)})
    assert state["beta"].item() == pytest.approx(10 * math.exp(0.05))
    assert trust(torch.zeros(3), 0.5).tolist() == [0.5] * 3


def test_lcpo_with_full_trust_is_diffusion_dpo() -> None:
    batch = replace(random_batch(), state={"eta": torch.tensor(1.0)})
    assert_equal_objectives(LCPO(beta=3.0), DiffusionDPO(beta=3.0), batch, "v_prediction")


def test_mapo_is_finite_and_right_at_small_and_large_errors() -> None:
    """x/(e^x - 1) at 0, 1e-9, 1e-3, 1, 50 is 1, 1 - 5e-10, 0.99950008, 0.5819767, 9.64e-21 (mpmath)."""
    x = torch.tensor([0.0, 1e-9, 1e-3, 1.0, 50.0], dtype=torch.float64, requires_grad=True)
    y = shrinking(x)
    expected = [1.0, 1 - 5e-10, 0.999500083333, 0.581976706869, 9.6437492398e-21]
    assert y.tolist() == pytest.approx(expected, rel=1e-9)
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[0].item() == pytest.approx(-0.5)
    for variant in ("code", "paper"):
        errors = torch.zeros(2, 3, requires_grad=True)
        loss, _ = mapo_loss(*errors, variant=variant, beta=64, weight=0.1, scale=1000, s=0.5)
        loss.sum().backward()
        assert torch.isfinite(errors.grad).all()


def test_mapo_by_hand() -> None:
    """e_w = 0, e_l = log 2: phi = 1 and log 2; paper at beta 2: margin 1 - log(2)^2, loss = log(1 + e^-margin)/2."""
    e_w, e_l = torch.tensor([0.0], dtype=torch.float64), torch.tensor([LOG_2], dtype=torch.float64)
    paper, margin = mapo_loss(e_w, e_l, variant="paper", beta=2.0, weight=0, scale=1, s=1)
    assert margin.item() == pytest.approx(1 - LOG_2**2)
    assert paper.item() == pytest.approx(math.log1p(math.exp(-(1 - LOG_2**2))) / 2)
    code, margin = mapo_loss(e_w, e_l, variant="code", beta=1, weight=0.1, scale=10, s=1.0)
    assert margin.item() == pytest.approx(10 * (1 - LOG_2))
    assert code.item() == pytest.approx(0.1 * math.log1p(math.exp(-10 * (1 - LOG_2))))


def test_mapo_pulls_the_winner_and_pushes_the_loser() -> None:
    err = torch.tensor([[0.2], [0.2]], requires_grad=True)
    mapo_loss(*err, variant="code", beta=1, weight=0.1, scale=1000, s=0.5)[0].sum().backward()
    assert err.grad[0].item() > 1 and err.grad[1].item() < 0


def test_sft_is_the_winners_error_independent_of_the_loser() -> None:
    """A model that predicts zero has the error mean(target^2) on each candidate; SFT's loss is the first one's."""
    batch = random_batch()
    zero = lambda noisy, timesteps, conditioning: torch.zeros_like(noisy)  # noqa: E731
    target = random_noise(batch, rng_for(batch, "flow")).target.unflatten(0, (4, 2))
    loss, _ = SFT().step(zero, zero, batch, rng_for(batch, "flow"))
    torch.testing.assert_close(loss, target[:, 0].square().flatten(1).mean(1))
    worse = replace(batch, latents=torch.cat([batch.latents[:, :1], 9 * batch.latents[:, 1:]], dim=1))
    assert torch.equal(SFT().step(zero, zero, worse, rng_for(worse, "flow"))[0], loss)


@pytest.mark.parametrize("cache", [True, False])
def test_sft_skips_disliked_samples_and_counts_them(cache: bool, tmp_path: Path) -> None:
    """Scores 1, -1, 0, 2, -3 of single images: the first and the fourth were liked; a limit counts liked ones."""
    write_images(tmp_path, ["a.jpg"])
    data = write_jsonl(
        tmp_path / "likes.jsonl",
        [{"prompt": "p", "images": ["a.jpg"], "scores": [score]} for score in (1, -1, 0, 2, -3)],
    )

    def counts(needs: Requirements, limit: int | None = None) -> dict[str, int]:
        return opened(tmp_path, data, needs=needs, cache=cache, limit=limit).counts

    assert counts(SFT.needs) == {"groups": 2, "skipped": 0, "disliked_left_out": 3}
    assert counts(SFT.needs, limit=2) == {"groups": 2, "skipped": 0, "disliked_left_out": 2}
    assert counts(Requirements()) == {"groups": 5, "skipped": 0}
    data.write_text(json.dumps({"prompt": "p", "images": ["a.jpg"], "scores": [-1]}) + "\n")
    with pytest.raises(UserError, match="no group is left: of 1, 0 are ties, 1 are disliked"):
        counts(SFT.needs)
