"""What every method on ranked lists shares: errors of all candidates against a reference, one loss per list."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import NoiseSharing, random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.objectives.pairwise import preference_metrics, wins
from t2i_align.utils.settings import Positive, settings


@settings
class Listwise(Objective):
    """Fields of every method on lists.

    beta: strength of the pull to the reference, with mean errors.
    noise: `shared` within a list, or `independent`.
    """

    beta: Positive = 2000.0
    noise: NoiseSharing = "shared"

    needs = Requirements(candidates=2, ties=False, reference=True, lists=True)

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        err, ref_err = random_noise(batch, rng, self.noise).errors_against(policy, reference)
        metrics = list_metrics(err.detach(), ref_err, batch.scores, beta=self.beta)
        return self.list_loss(err - ref_err, batch.scores), metrics

    def errors_key(self) -> str | None:
        return f"mean over {self.noise} noise under the prompt"

    @abstractmethod
    def list_loss(self, s: Tensor, scores: Tensor) -> Tensor:
        """Loss of each list, [B], from error differences s = err - ref_err and scores, [B, k]."""


def list_metrics(err: Tensor, ref_err: Tensor, scores: Tensor, *, beta: float) -> dict[str, Tensor]:
    """The pairwise metrics of the best and the worst candidate, and the share of all ordered pairs that agree.

    err, ref_err, scores: [B, k].
    """
    s = err - ref_err
    ordered = scores.unsqueeze(2) > scores.unsqueeze(1)
    agree = wins(s.unsqueeze(1) - s.unsqueeze(2))  # positive where the better one's error fell more
    metrics = preference_metrics(err[:, 0], err[:, -1], ref_err[:, 0], ref_err[:, -1], beta=beta)
    return metrics | {"rewards/pair_accuracies": (agree * ordered).sum((1, 2)) / ordered.sum((1, 2))}
