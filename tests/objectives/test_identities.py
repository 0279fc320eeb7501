"""What holds for every objective: one table of cases, in float64, forward and backward, for each forward process.

A new objective is in the table by its registered name; `AT_THE_REFERENCE` holds its loss where that is not log 2.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.data.schema import COLUMNS
from t2i_align.errors import UserError
from t2i_align.objectives import OBJECTIVES, get
from t2i_align.objectives.base import DataStats, Objective
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.objectives.dmpo import dmpo_loss
from tests.objectives.toy import DEPENDS_ON_THE_BATCH, KINDS, SHORT, as_required, loss_and_gradient, rich_batch, rows_of

CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("diffusion_dpo", {"noise": "independent"}),
    ("diffusion_dpo", {"guard": 0.5, "time_weight": "snr"}),
    ("diffusion_dpo", {"link": "ipo", "target_gradient": 0.4}),
    ("dense_dpo", {"variant": "per_clip"}),
    ("dense_dpo", {"link": "ipo", "target_gradient": 0.4, "guard": 0.5, "time_weight": "snr"}),
    ("mapo", {"variant": "paper"}),
    ("rankdpo", {"normalise": False}),
    ("dspo", {"beta": 0.3, "logit_beta": 5.0, "guard": 0.5, "noise": "independent"}),
    ("ncp_dpo", {"renoise": "uniform", "noise": "independent", "guard": 0.5}),
    ("inpo", {"inversion_model": "policy", "eta": 0.3, "noise": "independent", "inversion_guidance": 2.0}),
    *(
        ("reward", {**SHORT["reward"], "schedule": name, "last": 2})
        for name in ("refl", "draft", "draft_lv", "alignprop")
    ),
    ("reward", {**SHORT["reward"], "unconditional_gradient": False, "equalise": True, "target": 0.5}),
]
CASES = [(name, SHORT.get(name, {})) for name in OBJECTIVES] + VARIANTS
AT_THE_REFERENCE = {
    "lpo": math.log(24) / 3,  # all h are 0: term j is the log of how many remain, of 4 candidates
    "kto": 0.5,  # g = z = 0 and U(0) = 1/2
    "tkto": 0.5,
    "dmpo": dmpo_loss(torch.tensor(0.0, dtype=torch.float64), alpha=0.01).item(),
}


def build(name: str, options: dict[str, Any]) -> Objective:
    """Gentle enough that no sigmoid saturates on errors of about 1."""
    beta = next((field.default for field in fields(get(name)) if field.name == "beta"), None)
    if isinstance(beta, float) and beta > 3:
        options = {"beta": 3.0, **options}
    return get(name)(**options).fit_to_data(DataStats(score_range=(0.0, 1.0)))


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values())) or "default"


@KINDS
@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] not in DEPENDS_ON_THE_BATCH], ids=case_id)
def test_batch_equals_its_rows(name: str, options: dict[str, Any], kind: str) -> None:
    objective = build(name, options)
    batch = as_required(rich_batch(6, 4), objective)
    loss, gradient, _ = loss_and_gradient(objective, batch, kind, bounded=True)
    rows = [loss_and_gradient(objective, rows_of(batch, slice(i, i + 1)), kind, bounded=True) for i in range(6)]
    assert loss.shape == (6,) and gradient.abs().max() > 0
    torch.testing.assert_close(loss, torch.cat([row[0] for row in rows]))
    torch.testing.assert_close(
        gradient, sum(row[1] for row in rows), rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
    )


@KINDS
@pytest.mark.parametrize(
    ("name", "options"), [c for c in CASES if get(c[0]).needs.reference and c[0] != "dspo"], ids=case_id
)
def test_loss_where_policy_equals_reference(name: str, options: dict[str, Any], kind: str) -> None:
    objective = build(name, options)
    loss, _, metrics = loss_and_gradient(objective, as_required(rich_batch(4, 4), objective), kind, 0, 0, bounded=True)
    expected = 0.25 if options.get("link") == "ipo" else AT_THE_REFERENCE.get(name, math.log(2))
    if name == "rankdpo" and not objective.normalise:  # type: ignore[attr-defined]
        assert (loss > 0).all()  # log 2 times the sum of the pairs' weights
    else:
        torch.testing.assert_close(loss, torch.full_like(loss, expected))
    assert (metrics.get("rewards/accuracies", torch.tensor(0.5)) == 0.5).all()


@KINDS
@pytest.mark.parametrize(
    ("name", "options"), [c for c in CASES if issubclass(get(c[0]), DiffusionDPO) and c[0] != "tdpo"], ids=case_id
)
def test_exchanging_winner_and_loser_negates_margins(name: str, options: dict[str, Any], kind: str) -> None:
    objective = build(name, {**options, **({"noise": "shared"} if "noise" in options else {})})
    batch = as_required(rich_batch(), objective)
    texts = {name: value for name, value in batch.columns.items() if COLUMNS[name].text}
    captions = {name: {"prompt_embeds": value["prompt_embeds"].flip(1)} for name, value in texts.items()}
    exchanged = replace(batch, latents=batch.latents.flip(1), columns={**batch.columns, **captions})
    margins = [loss_and_gradient(objective, b, kind, bounded=True)[2]["rewards/margins"] for b in (batch, exchanged)]
    torch.testing.assert_close(margins[0], -margins[1])
    assert margins[0].abs().min() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_registered_objective_is_described(name: str) -> None:
    cls = get(name)
    assert cls.name == name and cls.paper and (CONFIGS / cls.config).is_file() and cls.__doc__


def test_unknown_objective_error_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown objective 'difusion_dpo'. Did you mean 'diffusion_dpo'.*sft"):
        get("difusion_dpo")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("diffusion_dpo", {"beta": 0}, "beta must be a positive number"),
        ("diffusion_dpo", {"beta": -1.0}, "beta must be a positive number"),
        ("diffusion_dpo", {"beta": math.nan}, "beta must be a positive number"),
        ("diffusion_dpo", {"label_smoothing": 0.5}, r"label_smoothing must be a number in \[0, 0.5\)"),
        ("diffusion_dpo", {"link": "hinge", "label_smoothing": 0.1}, "no meaning with link 'hinge'"),
        ("diffusion_dpo", {"link": "sigmod"}, "Did you mean 'sigmoid'"),
        ("diffusion_dpo", {"guard": 1.5}, r"guard must be a number in \[0, 1\] or null"),
        ("diffusion_dpo", {"target_gradient": 0.5}, r"target_gradient must be a number in \(0, 0.5\) or null"),
        ("mapo", {"beta": 0}, "beta must be a positive number"),
        ("mapo", {"weight": -1}, "weight must be a number of 0 or more"),
        ("dmpo", {"alpha": 0.5}, r"alpha must be a number in \(0, 0.5\)"),
        ("dmpo", {"link": "hinge"}, "no meaning for dmpo"),
        ("lcpo", {"eta": 0.5}, r"eta must be a number in \(0.5, 1\)"),
        ("lcpo", {"label_smoothing": 0.1}, "no meaning for lcpo"),
        ("tdpo", {"limit": 0}, "limit must be a positive number"),
        ("kto", {"desirable": 0, "undesirable": 0}, "^objective.desirable and .* must be 0 or more, and not both 0$"),
        ("kto", {"utility": "kahneman"}, "Did you mean 'kahneman_tversky'"),
        ("rankdpo", {"gain": "win"}, "Did you mean 'wins'"),
        ("dspo", {"beta": 1.0}, r"beta must be a number in \(0, 1\)"),
        ("dspo", {"logit_beta": 0.0}, "logit_beta must be a positive number or null"),
        ("dspo", {"guard": 1.1}, r"guard must be a number in \[0, 1\]"),
        ("ncp_dpo", {"renoise": "posterio"}, "Did you mean 'posterior'"),
        ("ncp_dpo", {"beta": 0}, "beta must be a positive number"),
        ("softrepa", {"temperature": 0.0}, "temperature must be a positive number"),
        ("softrepa", {"scale": -1.0}, "scale must be a positive number"),
        ("softrepa", {"dweight": -1.0}, "dweight must be a number of 0 or more"),
        ("softrepa", {"negatives": 0}, "negatives must be a whole number of at least 1"),
        ("inpo", {"levels": 0}, "levels must be a whole number of at least 1"),
        ("inpo", {"inversion_model": "polcy"}, "Did you mean 'policy'"),
        ("inpo", {"eta": 1.1}, r"eta must be a number in \[0, 1\]"),
        ("inpo", {"renoise": -1}, "renoise must be a whole number of 0 or more"),
        ("inpo", {"beta": 0.0}, "beta must be a positive number"),
    ],
)
def test_hyper_parameter_out_of_range_is_refused(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get(name)(**values)


def test_what_an_objective_needs_is_said_in_a_phrase() -> None:
    needs = {
        "sft": "winners or liked images",
        "kto": "likes and dislikes, or groups, with a reference",
        "mapo": "pairs",
        "rankdpo": "rankings, with a reference",
        "dense_dpo": "pairs, with segment scores and segment seconds and a reference",
        "ncp_dpo": "pairs, with a reference's features",
        "reward": "prompts, with a scorer",
    }
    assert {name: str(get(name).needs) for name in needs} == needs
