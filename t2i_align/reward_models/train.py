"""`t2i-align train-scorer`: a preference model from pairs, ties and rankings.

The folder of a run holds run.yaml, metrics.jsonl, checkpoints/, and when it is done scorer/, which `trained:FOLDER`
builds, and accuracy.json, its accuracy on the held-out preferences.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic_core import to_jsonable_python
from torch import Tensor, nn

from reward_scorers import ScorerError
from reward_scorers.trained import METADATA
from t2i_align.data.loader import micro_batches, steps
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.evaluation.result import plain
from t2i_align.objectives.base import Metrics
from t2i_align.reward_models import losses
from t2i_align.reward_models.config import ScorerRun, load
from t2i_align.reward_models.losses import Accuracy, measure
from t2i_align.reward_models.policies import Policy, begin
from t2i_align.reward_models.preferences import NO_USER, Preferences, open_preferences, split
from t2i_align.training.checkpoint import writing
from t2i_align.training.loop import Loop
from t2i_align.training.optimizer import check_machine
from t2i_align.training.output import open_run, write_settings
from t2i_align.training.task import Task
from t2i_align.training.weights import Weights
from t2i_align.utils.files import write_json

ACCURACY, SCORER = "accuracy.json", "scorer"
FREE_ON_RESUME = ("resume", "log")
EVALUATION_BATCH = 64  # groups


@dataclass(frozen=True, kw_only=True)
class ScorerResult:
    """folder: of the scorer, for `trained:FOLDER`. accuracy: by part of the data."""

    folder: Path
    steps: int
    accuracy: dict[str, Accuracy]


def train_scorer(
    config: ScorerRun | str | Path, overrides: Sequence[str] = (), *, progress: bool = True
) -> ScorerResult:
    """Train a preference model; see `ScorerRun`.

    Args:
        config: a ScorerRun, or the path of a YAML file such as those under configs/scorers/.
        overrides: `key=value` changes to the file, such as train.steps=200.

    Raises:
        UserError: a configuration, data or model that cannot be used, or a folder of another run.
    """
    run = config if isinstance(config, ScorerRun) else load(config, overrides)
    check_machine(run)
    settings = to_jsonable_python(run)
    with open_run(run, settings, free=FREE_ON_RESUME, extra=("features-", "images-")) as accelerator:
        return _train_into(Path(run.output_dir), run, settings, accelerator, progress)


def _train_into(
    output: Path, run: ScorerRun, settings: dict[str, Any], accelerator: Accelerator, progress: bool
) -> ScorerResult:
    opened: dict[str, Any] = {"root": output, "progress": progress and accelerator.is_main_process}
    with accelerator.main_process_first():
        data = open_preferences(run.data.path, format=run.data.format, annotations=run.data.annotations,
                                limit=run.data.limit, **opened)  # fmt: skip
        test = open_preferences(run.data.test, **opened) if run.data.test else None
    held_out = split(data, run.data)
    rows = held_out.pop("train")
    check_learnable(run, data, rows)
    torch.manual_seed(stable_seed(run.train.seed, "weights"))
    try:
        with accelerator.main_process_first():
            policy = begin(run, [data, test] if test else [data], sorted({data.users[row] for row in rows}),
                           cache=output, device=accelerator.device, progress=opened["progress"])  # fmt: skip
    except ScorerError as error:
        raise UserError(f"model: {error}") from error
    if run.tune == "users":  # decay would change known users' weights as well, whose gradients are zero
        run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, weight_decay=0.0))
    loop = Loop(ScorerTask(run, accelerator, policy, data, rows), accelerator, run, progress, settings=settings)
    if accelerator.is_main_process:
        write_settings(output, settings)
    loop.run()
    policy.network.eval()
    evaluated = {name: (data, part) for name, part in held_out.items()}
    if test:
        evaluated["test"] = (test, list(range(len(test))))
    accuracy = {name: evaluate(policy, *part, accelerator.device) for name, part in evaluated.items() if part[1]}
    if accelerator.is_main_process:
        with writing(output / SCORER) as folder:
            policy.save(folder)
            write_json(folder / METADATA, policy.metadata)
        write_json(output / ACCURACY, plain(accuracy))
    accelerator.wait_for_everyone()
    return ScorerResult(folder=output / SCORER, steps=run.train.steps, accuracy=accuracy)


@torch.no_grad()
def evaluate(policy: Policy, preferences: Preferences, rows: Sequence[int], device: torch.device) -> Accuracy:
    """Accuracy on these groups."""
    labels, scores = [preferences.labels[row] for row in rows], []
    for start in range(0, len(rows), EVALUATION_BATCH):
        batch = policy.batch(preferences, rows[start : start + EVALUATION_BATCH])
        scores.append(policy.network(**{key: value.to(device) for key, value in batch.items()}).float().cpu())
    return measure(losses.by_group(torch.cat(scores), labels), labels, [preferences.prompts[row] for row in rows])


class ScorerTask(Task):
    """A preference model on the groups `rows` of the data."""

    def __init__(
        self, run: ScorerRun, accelerator: Accelerator, policy: Policy, data: Preferences, rows: Sequence[int]
    ) -> None:
        self.run, self.accelerator, self.policy, self.data, self.rows = run, accelerator, policy, data, rows
        self.weights, self.fingerprint = Weights(policy.network), f"{data.fingerprint} {len(rows)}"
        self.balance = balance(run.train.balance, data, rows)

    def batches(self, step: int) -> Iterator[tuple[dict[str, Any], list[Tensor], Tensor]]:
        device, train = self.accelerator.device, self.run.train
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        ordered = steps(np.array(self.rows), seed=train.seed, size=train.batch_size * world, start=step)
        for places in micro_batches(ordered, train.batch_size, rank=rank, world=world):
            rows = [row for _, row in places]
            inputs = {key: value.to(device) for key, value in self.policy.batch(self.data, rows).items()}
            labels = [self.data.labels[row].to(device) for row in rows]
            yield inputs, labels, torch.tensor([self.balance[row] for row in rows], device=device)

    def losses(self, network: nn.Module, batch: tuple[dict[str, Any], list[Tensor], Tensor]) -> tuple[Tensor, Metrics]:
        inputs, labels, weight = batch
        scores = network(**inputs).float()
        loss = losses.per_group(self.run.loss, scores, labels)
        return loss * weight / weight.mean(), {"loss": loss, "accuracy": losses.right(scores.detach(), labels)}


def check_learnable(run: ScorerRun, data: Preferences, rows: Sequence[int]) -> None:
    """Raise UserError for data from which this loss, or this kind of model, learns nothing."""
    if run.loss not in losses.LEARN_FROM_TIES and not any(data.labels[row].unique().numel() > 1 for row in rows):
        others = " or ".join(losses.LEARN_FROM_TIES)
        raise UserError(
            f"{run.data.path}: only ties to train on; {run.loss} learns nothing from them, loss={others} does"
        )
    if run.tune in ("pal", "users") and all(data.users[row] == NO_USER for row in rows):
        raise UserError(f"{run.data.path}: names no users, which tune={run.tune} needs; linear or lora need none")


def balance(kind: str, data: Preferences, rows: Sequence[int]) -> dict[int, float]:
    """Each group's weight by its row: 1 over the number of groups of its prompt or user."""
    if kind == "none":
        return dict.fromkeys(rows, 1.0)
    keys = data.prompts if kind == "prompt" else data.users
    counts = Counter(keys[row] for row in rows)
    return {row: 1.0 / counts[keys[row]] for row in rows}
