"""Identities that hold for every objective: special cases, batches, ties, edges; in float64, forward and backward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.data.schema import Batch
from t2i_align.errors import UserError
from t2i_align.objectives import DCPO, DMPO, LCPO, TDPO, TKTO, DiffusionDPO, DiffusionKTO, DiffusionLPO, MaPO, RankDPO
from t2i_align.objectives.dmpo import dmpo_loss
from t2i_align.objectives.guard import safeguard, scale_gradient
from t2i_align.objectives.kto import kto_loss, liked_candidates
from t2i_align.objectives.lcpo import trust
from t2i_align.objectives.lpo import plackett_luce_loss
from t2i_align.objectives.mapo import mapo_loss, shrinking
from t2i_align.objectives.rankdpo import dcg_weights, rankdpo_loss, win_rates
from tests.objectives.test_core import PROCESSES, draw_for, linear_model, random_batch

LOG_2 = math.log(2)


def ranked_batch(k: int = 4) -> Batch:
    """Four groups of k, best first, with scores k - 1 … 0."""
    batch = random_batch(4, k)
    return replace(batch, scores=torch.arange(k - 1.0, -1, -1).expand(4, k))


def captioned_batch(k: int = 2, seed: int = 5) -> Batch:
    """Captions for each candidate and a negative one, all different from the prompt."""
    batch, generator = random_batch(4, k), torch.Generator().manual_seed(seed)

    def text(*shape: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.randn(*shape, 2, 5, generator=generator, dtype=torch.float64)}

    return replace(batch, captions=text(4, k), negative_caption=text(4), state={"eta": torch.tensor(0.9)})


def same_captions(batch: Batch, k: int = 2) -> Batch:
    """Every caption is the prompt."""
    embeds = batch.conditioning["prompt_embeds"]
    return replace(
        batch,
        captions={"prompt_embeds": embeds.unsqueeze(1).expand(-1, k, -1, -1)},
        negative_caption={"prompt_embeds": embeds},
    )


def row_of(batch: Batch, i: int) -> Batch:
    def cut(texts: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        return None if texts is None else {name: value[i : i + 1] for name, value in texts.items()}

    return replace(
        batch,
        keys=batch.keys[i : i + 1],
        latents=batch.latents[i : i + 1],
        scores=batch.scores[i : i + 1],
        conditioning={name: value[i : i + 1] for name, value in batch.conditioning.items()},
        captions=cut(batch.captions),
        negative_caption=cut(batch.negative_caption),
    )


def loss_and_gradient(objective, batch: Batch, kind: str, policy_seed: int = 0, reference_seed: int = 1):
    (policy, weight), (reference, _) = linear_model(policy_seed), linear_model(reference_seed)
    loss, metrics = objective.step(policy, reference, batch, draw_for(batch, kind))
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    return loss.detach(), gradient, metrics


def assert_equal_objectives(one, other, batch: Batch, kind: str) -> None:
    loss, gradient, _ = loss_and_gradient(one, batch, kind)
    other_loss, other_gradient, _ = loss_and_gradient(other, batch, kind)
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(gradient, other_gradient)


# What every objective has ---------------------------------------------------------------------------------------------

INDEPENDENT_OF_THE_BATCH = [
    (DiffusionDPO(beta=3.0, guard=0.5), captioned_batch),
    (DiffusionDPO(beta=3.0, time_weight="snr"), captioned_batch),
    (MaPO(), captioned_batch),
    (MaPO(variant="paper"), captioned_batch),
    (DCPO(beta=3.0), captioned_batch),
    (TDPO(beta=3.0), captioned_batch),
    (DMPO(beta=3.0), captioned_batch),
    (LCPO(beta=3.0), captioned_batch),
    (RankDPO(beta=3.0), ranked_batch),
    (RankDPO(beta=3.0, normalise=False), ranked_batch),
    (DiffusionLPO(beta=3.0), ranked_batch),
]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(("objective", "data"), INDEPENDENT_OF_THE_BATCH, ids=lambda x: getattr(x, "name", ""))
def test_a_batch_equals_its_rows_one_at_a_time(kind: str, objective, data) -> None:
    batch = data() if objective.name == "dcpo" or data is ranked_batch else replace(data(), captions=None)
    whole, whole_gradient, _ = loss_and_gradient(objective, batch, kind)
    parts = [loss_and_gradient(objective, row_of(batch, i), kind) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat([loss for loss, _, _ in parts]))
    torch.testing.assert_close(whole_gradient, sum(gradient for _, gradient, _ in parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(
    ("objective", "batch"),
    [
        (DCPO(beta=5000), captioned_batch()),
        (TDPO(), captioned_batch()),
        (LCPO(), captioned_batch()),
        (RankDPO(), ranked_batch()),
        (DiffusionDPO(guard=0.9, time_weight="snr"), captioned_batch()),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_policy_equal_to_reference_gives_log_2(kind: str, objective, batch: Batch) -> None:
    loss, _, metrics = loss_and_gradient(objective, batch, kind, 0, 0)
    torch.testing.assert_close(loss, torch.full_like(loss, LOG_2))
    assert (metrics["rewards/accuracies"] == 0.5).all()


def test_lists_with_policy_equal_to_reference_are_counted_out_by_hand() -> None:
    """All h_k = 0: term j is the log of how many remain, so 4 candidates give (log 4 + log 3 + log 2)/3."""
    loss, _, _ = loss_and_gradient(DiffusionLPO(), ranked_batch(), "flow", 0, 0)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(24) / 3))


# Special cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROCESSES)
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
    """Equal captions; lists of two (weight 1); a flip rate of 0; a guard at which nothing is held back."""
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


def test_the_guard_passes_the_share_worked_out_by_hand() -> None:
    """g_w = (2, 0), mu = 1/2. g_l = (4, 3): <g_l, g_w> = 8, |g_w|^2 = 4, share 1/2 * 4/8 = 1/4; g_l = (-1, 0): all;

    g_l = (0.1, 0): 1/2 * 4/0.2 = 10, capped at 1; g_l orthogonal: all."""
    g_w = torch.tensor([[2.0, 0.0]]).expand(4, 2)
    g_l = torch.tensor([[4.0, 3.0], [-1.0, 0.0], [0.1, 0.0], [0.0, 5.0]])
    torch.testing.assert_close(safeguard(g_w, g_l, 0.5), torch.tensor([0.25, 1.0, 1.0, 1.0]))
    value = torch.tensor([2.0], requires_grad=True)
    scaled = scale_gradient(value**2, torch.tensor([0.25]))
    scaled.backward()
    assert scaled.item() == 4.0 and value.grad.item() == 1.0  # 0.25 * 2 * 2


def test_the_guard_bounds_the_winners_error_to_first_order() -> None:
    """Along -(g_w - share g_l), the winner's error falls: g_w . (g_w - share g_l) >= mu |g_w|^2 >= 0."""
    generator = torch.Generator().manual_seed(0)
    g_w, g_l = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 4.0]).view(2, 1, 1)
    share = safeguard(g_w, g_l, 0.3).unsqueeze(1)
    gain = (g_w * (g_w - share * g_l)).sum(1)
    assert (gain >= 0.3 * g_w.square().sum(1) - 1e-9).all()
    assert ((g_w * (g_w - g_l)).sum(1) < 0).any()  # without the guard it would rise for some


@pytest.mark.parametrize("kind", PROCESSES)
def test_tdpo_with_equal_texts_teaches_nothing(kind: str) -> None:
    """Both sides are the same error, so h = 0 and its gradient vanishes, whatever the policy (below the limit)."""
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


@pytest.mark.parametrize("kind", PROCESSES)
def test_dcpo_denoises_each_candidate_under_its_own_caption(kind: str) -> None:
    """Exchanging candidates together with captions negates the margin; exchanging captions alone does not."""
    batch = captioned_batch()
    flipped = {"prompt_embeds": batch.captions["prompt_embeds"].flip(1)}
    both = replace(batch, latents=batch.latents.flip(1), captions=flipped)
    margins = [
        loss_and_gradient(DCPO(beta=3.0), b, kind)[2]["rewards/margins"]
        for b in (batch, both, replace(batch, captions=flipped))
    ]
    torch.testing.assert_close(margins[0], -margins[1])
    assert (margins[0] - margins[2]).abs().min() > 1e-6 and (margins[0] + margins[2]).abs().min() > 1e-6


# Lists ----------------------------------------------------------------------------------------------------------------


def test_win_rates_and_dcg_weights_worked_out_by_hand() -> None:
    """Scores 3, 1, 1: win rates (1, 1/4, 1/4); ranks 1, 2.5, 2.5; only the first beats others.

    D = (2^1 - 2^(1/4)) (1/log 2 - 1/log 3.5).
    """
    scores = torch.tensor([[3.0, 1.0, 1.0]], dtype=torch.float64)
    phi = win_rates(scores)
    torch.testing.assert_close(phi, torch.tensor([[1.0, 0.25, 0.25]]))
    weights = dcg_weights(scores, phi.double())
    expected = (2 - 2**0.25) * (1 / math.log(2) - 1 / math.log(3.5))
    assert weights[0, 0].tolist() == pytest.approx([0, expected, expected])
    assert weights[0, 1:].abs().sum() == 0


def test_rankdpo_sums_weighted_pairs() -> None:
    """Two candidates, s = (-0.02, 0.05), beta = 100: h = 3.5 (see test_objectives), weight 0.3 kept or not."""
    s, weights = torch.tensor([[-0.02, 0.05]]), torch.tensor([[[0.0, 0.3], [0.0, 0.0]]])
    plain = F.softplus(torch.tensor(-3.5)).item()
    assert rankdpo_loss(s, weights, beta=100, normalise=False).item() == pytest.approx(0.3 * plain, rel=1e-5)
    assert rankdpo_loss(s, weights, beta=100, normalise=True).item() == pytest.approx(plain, rel=1e-5)


def test_gains_from_scores_must_be_win_rates() -> None:
    batch = ranked_batch()
    with pytest.raises(UserError, match=r"needs scores in \[0, 1\]"):
        loss_and_gradient(RankDPO(gain="scores"), batch, "flow")
    as_rates = replace(batch, scores=batch.scores / 3)
    by_scores, _, _ = loss_and_gradient(RankDPO(gain="scores"), as_rates, "flow")
    by_wins, _, _ = loss_and_gradient(RankDPO(gain="wins"), batch, "flow")
    torch.testing.assert_close(by_scores, by_wins)  # (3, 2, 1, 0)/3 are these candidates' win rates


def test_plackett_luce_equals_the_enumerated_likelihood() -> None:
    """P(a > b > c) = e^a/(e^a + e^b + e^c) * e^b/(e^b + e^c); the order in which candidates stand does not matter."""
    h = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.0, 2.0]])  # the third is best, then the first
    e = h.exp()[0]
    likelihood = e[2] / e.sum() * e[0] / (e[0] + e[1])
    assert plackett_luce_loss(h, scores).item() == pytest.approx(-math.log(likelihood) / 2)


def test_ties_in_a_list_are_inert() -> None:
    """Two equal candidates are not compared: the gradient pulls the best up and both others down alike."""
    h = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    plackett_luce_loss(h, torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]], dtype=torch.float64))
    s = torch.zeros(1, 2, requires_grad=True)
    tied = torch.zeros(1, 2)
    rankdpo_loss(s, dcg_weights(tied, win_rates(tied)), beta=9, normalise=True).sum().backward()
    assert s.grad.abs().sum() == 0
    assert plackett_luce_loss(torch.tensor([[1.0, 2.0]]), tied).item() == 0


# Links and utilities --------------------------------------------------------------------------------------------------


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


def test_mapo_equals_numbers_worked_out_by_hand() -> None:
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


def test_dmpo_vanishes_at_its_optimum_and_equals_the_kl_divergence() -> None:
    """KL(1/2 || 0.9, 0.1) = 1/2 log(1/2 / 0.9) + 1/2 log(1/2 / 0.1) = 0.5108256."""
    best = torch.tensor(math.log(9.0), dtype=torch.float64, requires_grad=True)
    loss = dmpo_loss(best, alpha=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and best.grad.item() == pytest.approx(0, abs=1e-12)
    assert dmpo_loss(torch.tensor(0.0), alpha=0.1).item() == pytest.approx(0.5108256)


def test_lcpo_trusts_by_bayes_and_carries_its_mean() -> None:
    """h = log 3, eta = 0.8: p = 3/4, w = 0.6/(0.6 + 0.05) = 12/13; eta' = 0.8 + 0.1 (12/13 - 0.8)."""
    w = trust(torch.tensor(math.log(3.0), requires_grad=True), 0.8)
    assert w.item() == pytest.approx(12 / 13) and not w.requires_grad
    objective = LCPO(eta=0.8, rate=0.1)
    state = {"eta": torch.tensor(objective.initial_state()["eta"], dtype=torch.float64)}
    state = objective.update_state(state, {"lcpo/trust": w})
    assert state["eta"].item() == pytest.approx(0.8 + 0.1 * (12 / 13 - 0.8))
    assert trust(torch.zeros(3), 0.5).tolist() == [0.5] * 3


def test_lcpo_with_full_trust_is_diffusion_dpo() -> None:
    batch = replace(random_batch(), state={"eta": torch.tensor(1.0)})
    assert_equal_objectives(LCPO(beta=3.0), DiffusionDPO(beta=3.0), batch, "v_prediction")


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


def test_kto_utilities_worked_out_by_hand() -> None:
    """g = 1.5, z = 0.5: v = 1 liked, -1 disliked; U = s(-1) = 0.268941 and s(1) = 0.731059, times lambda_y."""
    g, liked = torch.tensor([1.5, 1.5]), torch.tensor([True, False])
    options = {"desirable": 2.0, "undesirable": 0.5}
    z = torch.tensor(0.5)
    loss = kto_loss(g, liked, z, utility="kahneman_tversky", **options)
    assert loss.tolist() == pytest.approx([2 * 0.268941, 0.5 * 0.731059], rel=1e-5)
    averse = kto_loss(g, liked, z, utility="loss_averse", **options)
    assert averse.tolist() == pytest.approx([2 * 0.313262, 0.5 * 1.313262], rel=1e-5)  # softplus(-1), softplus(1)
    seeking = kto_loss(g, liked, z, utility="risk_seeking", **options)
    assert seeking.tolist() == pytest.approx([-2 * 1.313262, -0.5 * 0.313262], rel=1e-5)


@pytest.mark.parametrize("kind", PROCESSES)
def test_kto_at_the_reference_and_its_direction(kind: str) -> None:
    """At the reference g = z = 0 and U = 1/2; a step against the gradient lowers liked and raises disliked errors."""
    loss, _, metrics = loss_and_gradient(DiffusionKTO(), random_batch(), kind, 0, 0)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.5))
    assert (metrics["rewards/chosen"] == 0).all()
    err = torch.tensor([0.1, 0.1], requires_grad=True)
    g = 50 * (torch.tensor([0.1, 0.1]) - err)
    options = {"utility": "kahneman_tversky", "desirable": 1.0, "undesirable": 1.0}
    kto_loss(g, torch.tensor([True, False]), torch.tensor(0.0), **options).sum().backward()
    assert err.grad[0].item() > 0 > err.grad[1].item()


def test_who_is_liked() -> None:
    assert liked_candidates(torch.tensor([[1.0], [0.0], [-2.0]])).tolist() == [[True], [False], [False]]
    assert liked_candidates(torch.tensor([[3.0, 3.0, 1.0]])).tolist() == [[True, True, False]]


def test_kto_of_single_samples_leaves_the_other_sides_metrics_out() -> None:
    batch = replace(random_batch(k=1), scores=torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
    _, _, metrics = loss_and_gradient(DiffusionKTO(), batch, "flow")
    assert metrics["rewards/chosen"].isnan().tolist() == [False, True, False, True]
    assert metrics["rewards/rejected"].isnan().tolist() == [True, False, True, False]


def test_tkto_likes_the_prompt_and_dislikes_the_negative() -> None:
    """It is Diffusion-KTO on the same latents twice: liked under the prompt, disliked under the other text."""
    batch = captioned_batch()
    doubled = replace(
        batch,
        latents=batch.latents[:, :1].expand(-1, 2, -1, -1, -1),
        scores=torch.tensor([[1.0, 0.0]] * 4),
        captions={
            "prompt_embeds": torch.stack(
                [batch.conditioning["prompt_embeds"], batch.negative_caption["prompt_embeds"]], dim=1
            )
        },
    )
    loss, gradient, _ = loss_and_gradient(TKTO(beta=3.0), batch, "epsilon")
    expected, expected_gradient, _ = loss_and_gradient(DiffusionKTO(beta=3.0), doubled, "epsilon")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


# Metrics --------------------------------------------------------------------------------------------------------------


def test_margins_are_split_by_time_and_add_up() -> None:
    batch = random_batch(64)
    _, _, metrics = loss_and_gradient(DiffusionDPO(beta=3.0), batch, "flow")
    quarters = torch.stack([value for name, value in metrics.items() if name.startswith("rewards/margins/t")])
    assert len(quarters) == 4 and ((~quarters.isnan()).sum(0) == 1).all()
    torch.testing.assert_close(quarters.nansum(0), metrics["rewards/margins"])
    times = draw_for(batch, "flow").timesteps()
    assert torch.equal(~quarters[0].isnan(), times < 250) and torch.equal(~quarters[3].isnan(), times >= 750)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaPO(beta=0), "beta must be a positive number"),
        (lambda: MaPO(weight=-1), "weight must be a number of 0 or more"),
        (lambda: DMPO(alpha=0.5), r"alpha must be a number in \(0, 0.5\)"),
        (lambda: DMPO(link="hinge"), "no meaning for dmpo"),
        (lambda: LCPO(eta=0.5), r"eta must be a number in \(0.5, 1\)"),
        (lambda: LCPO(label_smoothing=0.1), "no meaning for lcpo"),
        (lambda: TDPO(limit=0), "limit must be a positive number"),
        (lambda: DiffusionKTO(desirable=0, undesirable=0), "not both 0"),
        (lambda: DiffusionKTO(utility="kahneman"), "Did you mean 'kahneman_tversky'"),
        (lambda: RankDPO(gain="win"), "Did you mean 'wins'"),
        (lambda: DiffusionDPO(guard=1.5), r"guard must be a number in \[0, 1\] or null"),
        (lambda: DiffusionDPO(target_gradient=0.5), r"target_gradient must be a number in \(0, 0.5\) or null"),
    ],
)
def test_senseless_hyper_parameters_are_refused(build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
