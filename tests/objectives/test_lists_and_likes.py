"""RankDPO and Diffusion-LPO on rankings, Diffusion-KTO and TKTO on likes, against hand-derived numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from t2i_align.errors import UserError
from t2i_align.objectives import TKTO, DiffusionKTO, RankDPO
from t2i_align.objectives.base import DataStats
from t2i_align.objectives.kto import kto_loss, liked_candidates
from t2i_align.objectives.listwise import list_metrics
from t2i_align.objectives.lpo import plackett_luce_loss
from t2i_align.objectives.rankdpo import dcg_weights, rankdpo_loss, win_rates
from tests.objectives.toy import KINDS, loss_and_gradient, random_batch, rich_batch

LOG_2 = math.log(2)


# Rankings -------------------------------------------------------------------------------------------------------------


def test_win_rates_and_dcg_weights_by_hand() -> None:
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
    batch = random_batch(4, 4)
    batch = replace(batch, scores=torch.arange(3.0, -1, -1).expand(4, 4))
    with pytest.raises(UserError, match=r"^objective\.gain 'scores' needs scores in \[0, 1\] .*, found 0 to 3; use"):
        RankDPO(gain="scores").fit_to_data(DataStats(score_range=(0.0, 3.0)))
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


def test_ties_in_a_list_have_no_gradient() -> None:
    """Two equal candidates are not compared: the gradient pulls the best up and both others down alike."""
    h = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    plackett_luce_loss(h, torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]], dtype=torch.float64))
    s = torch.zeros(1, 2, requires_grad=True)
    tied = torch.zeros(1, 2)
    rankdpo_loss(s, dcg_weights(tied, win_rates(tied)), beta=9, normalise=True).sum().backward()
    assert s.grad.abs().sum() == 0
    assert plackett_luce_loss(torch.tensor([[1.0, 2.0]]), tied).item() == 0


def test_ordered_pairs_that_agree_are_counted_and_equal_margins_half() -> None:
    """s = (0.1, 0.1, 0.3). Scores 2 > 1 > 0: margins 0, 0.2, 0.2, so (1/2 + 1 + 1) / 3.

    Scores 1 > 0 = 0: (1/2 + 1) / 2. Scores 0 = 0 < 1: the third, whose error rose most, is best: margins -0.2, so 0.
    """
    err, scores = torch.tensor([[0.1, 0.1, 0.3]] * 3), torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    metrics = list_metrics(err, torch.zeros_like(err), scores, beta=2.0)
    torch.testing.assert_close(metrics["rewards/pair_accuracies"], torch.tensor([2.5 / 3, 0.75, 0.0]))


# Likes ----------------------------------------------------------------------------------------------------------------


def test_kto_utilities_by_hand() -> None:
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


@KINDS
def test_kto_lowers_liked_and_raises_disliked_errors(kind: str) -> None:
    """At the reference g = z = 0 and U = 1/2; a step against the gradient lowers liked and raises disliked errors."""
    loss, _, metrics = loss_and_gradient(DiffusionKTO(), random_batch(), kind, 0, 0)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.5))
    assert (metrics["rewards/chosen"] == 0).all()
    err = torch.tensor([0.1, 0.1], requires_grad=True)
    g = 50 * (torch.tensor([0.1, 0.1]) - err)
    options = {"utility": "kahneman_tversky", "desirable": 1.0, "undesirable": 1.0}
    kto_loss(g, torch.tensor([True, False]), torch.tensor(0.0), **options).sum().backward()
    assert err.grad[0].item() > 0 > err.grad[1].item()


def test_best_or_positive_candidates_are_liked() -> None:
    assert liked_candidates(torch.tensor([[1.0], [0.0], [-2.0]])).tolist() == [[True], [False], [False]]
    assert liked_candidates(torch.tensor([[3.0, 3.0, 1.0]])).tolist() == [[True, True, False]]


def test_kto_metrics_of_the_absent_side_are_nan() -> None:
    batch = replace(random_batch(k=1), scores=torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
    _, _, metrics = loss_and_gradient(DiffusionKTO(), batch, "flow")
    assert metrics["rewards/chosen"].isnan().tolist() == [False, True, False, True]
    assert metrics["rewards/rejected"].isnan().tolist() == [True, False, True, False]


def test_tkto_likes_the_prompt_and_dislikes_the_negative() -> None:
    """It is Diffusion-KTO on the same latents twice: liked under the prompt, disliked under the other text."""
    batch = rich_batch()
    doubled = replace(
        batch,
        latents=batch.latents[:, :1].expand(-1, 2, -1, -1, -1),
        scores=torch.tensor([[1.0, 0.0]] * 4),
        columns={
            "captions": {
                "prompt_embeds": torch.stack(
                    [batch.conditioning["prompt_embeds"], batch.negative_caption["prompt_embeds"]], dim=1
                )
            }
        },
    )
    loss, gradient, _ = loss_and_gradient(TKTO(beta=3.0), batch, "epsilon")
    expected, expected_gradient, _ = loss_and_gradient(DiffusionKTO(beta=3.0), doubled, "epsilon")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
