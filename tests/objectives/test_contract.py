"""What is asked of an objective beside its loss: its class by name, errors to store, to do without a reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2i_align import objectives
from t2i_align.data.batch import Conditioning
from t2i_align.diffusion.noising import random_noise, squared_error
from t2i_align.errors import UserError
from t2i_align.objectives import DCPO, SFT, TDPO, DiffusionDPO, DiffusionLPO, Requirements
from t2i_align.objectives.base import Objective
from t2i_align.objectives.diffusion_dpo import link_loss
from t2i_align.utils.settings import settings
from tests.objectives.toy import KINDS, linear_model, random_batch, rng_for


class Storing:
    """A reference that keeps its errors, or has them already."""

    def __init__(self, stored: Tensor | None = None) -> None:
        self.model, self.stored, self.asked = linear_model(1)[0], stored, 0
        self.kept: list[Tensor] = []

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.asked += 1
        return self.model(noisy, timesteps, conditioning)

    def keep(self, errors: Tensor) -> None:
        self.kept.append(errors)


@KINDS
@pytest.mark.parametrize(
    "objective", [DiffusionDPO(), DiffusionDPO(reduction="sum"), DiffusionLPO()], ids=["mean", "sum", "lpo"]
)
def test_the_references_errors_are_kept_and_serve_instead_of_it(objective: Objective, kind: str) -> None:
    batch, (policy, _), computing = random_batch(), linear_model(0), Storing()
    loss, _ = objective.step(policy, computing, batch, rng_for(batch, kind))
    residuals = random_noise(batch, rng_for(batch, kind)).residuals(computing.model)
    (kept,) = computing.kept
    torch.testing.assert_close(kept, squared_error(residuals, getattr(objective, "reduction", "mean")).detach())
    recalling = Storing(kept)
    again, metrics = objective.step(policy, recalling, batch, rng_for(batch, kind))
    torch.testing.assert_close(again, loss)
    assert (computing.asked, recalling.asked, recalling.kept) == (1, 0, []) and "drift" not in metrics


def test_stored_errors_are_shared_by_objectives_that_meet_the_same_ones() -> None:
    assert DiffusionDPO().errors_key() == DiffusionLPO().errors_key() == "mean over shared noise under the prompt"
    assert DiffusionDPO(reduction="sum", noise="independent").errors_key() == (
        "sum over independent noise under the prompt"
    )
    assert DCPO().errors_key() == "mean over shared noise under the captions"
    assert TDPO().errors_key() == "mean over shared noise under the prompt, paired by TDPO"
    assert SFT().errors_key() is None


@settings
class WithoutReference(DiffusionDPO):
    """Diffusion-DPO on the policy's errors alone."""

    name = "without_reference"
    needs = replace(DiffusionDPO.needs, reference=False)


@KINDS
def test_a_method_on_pairs_without_a_reference_keeps_link_and_metrics(kind: str) -> None:
    """h = -1/2 beta (err_w - err_l): the reference's errors are 0, and nothing is said of a distance to it."""
    batch, (policy, _) = random_batch(), linear_model(0)

    def reference(*inputs: object) -> Tensor:
        pytest.fail("the reference was asked")

    objective = WithoutReference(beta=3.0)
    loss, metrics = objective.step(policy, reference, batch, rng_for(batch, kind))
    errors = random_noise(batch, rng_for(batch, kind)).errors(policy)
    margins = -1.5 * (errors[:, 0] - errors[:, 1])
    torch.testing.assert_close(loss, link_loss(margins))
    torch.testing.assert_close(metrics["rewards/margins"], margins.detach())
    torch.testing.assert_close(metrics["error/chosen"], errors[:, 0].detach())
    torch.testing.assert_close(metrics["rewards/gradient_factor"], torch.sigmoid(-margins).detach())
    _, with_one = DiffusionDPO(beta=3.0).step(policy, policy, batch, rng_for(batch, kind))
    assert set(with_one) - set(metrics) == {
        "error/chosen_minus_reference", "error/rejected_minus_reference", "drift",
    }  # fmt: skip
    assert objective.errors_key() is None


def test_every_name_stands_for_its_class_and_a_class_for_itself() -> None:
    table = objectives.OBJECTIVES
    assert list(table) == list(objectives.CLASSES)
    assert table["diffusion_dpo"] is DiffusionDPO is objectives.Pairwise and table["sft"] is SFT
    assert objectives.get(WithoutReference) is WithoutReference and objectives.get("sft") is objectives.get(SFT) is SFT
    assert objectives.Requirements is Requirements
    with pytest.raises(AttributeError, match=r"^module 't2i_align\.objectives' has no attribute 'Nothing'$"):
        _ = objectives.Nothing


def test_a_class_that_is_no_objective_is_refused_by_its_name() -> None:
    class Unfinished(Objective):
        name = "unfinished"

    expected = r"^objective .*'int'.*: expected a subclass of t2i_align\.objectives\.Objective, found <class 'int'>$"
    with pytest.raises(UserError, match=expected):
        objectives.get(int)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^objective .*Unfinished.*: the class lacks needs$"):
        objectives.get(Unfinished)
