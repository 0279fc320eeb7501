"""`t2i-align train-scorer`: a preference model from pairs, ties and rankings.

The folder of a run holds run.yaml, metrics.jsonl, checkpoints/, and when it is done scorer/, which `trained:FOLDER`
builds, and accuracy.json, what it orders rightly of the held-out preferences.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, nn

from reward_scorers import ScorerError, build
from reward_scorers.heads import PAL
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.towers import TwoTowers
from reward_scorers.trained import CLIP, HEAD, LAYOUT, METADATA, load_head, make_head, read_metadata
from t2i_align.data.loader import micro_batches, steps
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.evaluation.result import number
from t2i_align.evaluation.stats import compare
from t2i_align.objectives.base import Metrics
from t2i_align.reward_models import losses
from t2i_align.reward_models.config import ScorerRun, load
from t2i_align.reward_models.policies import Features, FrozenFeatures, Policy, WholeClip
from t2i_align.reward_models.preferences import NO_USER, Preferences, open_preferences, split
from t2i_align.training.loop import Loop, Task
from t2i_align.training.output import check_output, write_settings
from t2i_align.training.weights import Weights
from t2i_align.utils.files import atomic_folder, output_lock, write_json

ACCURACY, SCORER = "accuracy.json", "scorer"
FREE_ON_RESUME = ("resume", "log")
EVALUATION_BATCH = 64  # groups


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many pairs with a winner are ordered rightly, draws half, with a 95 % interval over prompts."""

    pairs: int
    prompts: int
    accuracy: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}] of {self.pairs} pairs"


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
    AcceleratorState._reset_state()
    precision = {"fp32": "no"}.get(run.train.precision, run.train.precision)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    output, settings = Path(run.output_dir).expanduser(), json.loads(json.dumps(dataclasses.asdict(run)))
    with output_lock(output, first=accelerator.is_main_process):
        if accelerator.is_main_process:
            check_output(output, settings, resume=run.resume, free=FREE_ON_RESUME, extra=("features-", "images-"))
        accelerator.wait_for_everyone()
        return _train_into(output, run, settings, accelerator, progress)


def _train_into(
    output: Path, run: ScorerRun, settings: dict[str, Any], accelerator: Accelerator, progress: bool
) -> ScorerResult:
    opened: dict[str, Any] = {"root": output, "progress": progress and accelerator.is_main_process}
    with accelerator.main_process_first():
        data = open_preferences(run.data.path, format=run.data.format, annotations=run.data.annotations,
                                limit=run.data.limit, **opened)  # fmt: skip
        test = open_preferences(run.data.test, **opened) if run.data.test else None
    parts = split(data, run.data)
    check_learnable(run, data, parts.train)
    torch.manual_seed(stable_seed(run.train.seed, "weights"))
    try:
        with accelerator.main_process_first():
            model = Model.begin(run, data, test, parts.train, output, accelerator.device, opened["progress"])
    except ScorerError as error:
        raise UserError(f"model: {error}") from error
    if run.tune == "users":  # decay would change known users' weights as well, whose gradients are zero
        run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, weight_decay=0.0))
    loop = Loop(ScorerTask(run, accelerator, model.policy, data, parts.train), accelerator, run, progress)
    if run.resume:
        loop.resume()
    if accelerator.is_main_process:
        write_settings(output, settings)
    loop.run()
    held_out = {"new_prompts": (data, parts.new_prompts), "new_users": (data, parts.new_users)}
    if test is not None:
        held_out["test"] = (test, list(range(len(test))))
    accuracy = {}
    model.policy.network.eval()
    for name, (preferences, rows) in held_out.items():
        if rows:
            scores = model.scores(preferences, rows, accelerator.device)
            accuracy[name] = measure(scores, [preferences.labels[row] for row in rows],
                                     [preferences.prompts[row] for row in rows])  # fmt: skip
    if accelerator.is_main_process:
        model.save(run, output / SCORER)
        told = {name: dataclasses.asdict(value) for name, value in accuracy.items()}
        numbers = {name: {**v, "accuracy": number(v["accuracy"]), "interval": [number(x) for x in v["interval"]]}
                   for name, v in told.items()}  # fmt: skip
        write_json(output / ACCURACY, numbers)
    accelerator.wait_for_everyone()
    return ScorerResult(folder=output / SCORER, steps=run.train.steps, accuracy=accuracy)


@dataclass
class Model:
    """A policy for the data, one for the test source where features differ, and how to save it."""

    policy: Policy
    test_policy: Policy
    test: Preferences | None
    told: dict[str, Any]

    @classmethod
    def begin(
        cls, run: ScorerRun, data: Preferences, test: Preferences | None, rows: Sequence[int], output: Path,
        device: torch.device, progress: bool,
    ) -> Model:  # fmt: skip
        """The model with its first weights."""
        name = run.name or Path(run.output_dir).name
        told: dict[str, Any] = {"layout": LAYOUT, "name": name, "kind": "clip", "users": []}
        if run.tune in ("full", "lora"):
            base = build(run.model)
            assert isinstance(base, HFClipScorer)
            whole = WholeClip(base.to(device), run.lora if run.tune == "lora" else None)
            return cls(whole, whole, test, told)
        trained: nn.Module | None = None
        if run.tune == "users":
            folder, told = read_metadata(Path(run.model).expanduser())
            if told["kind"] != "pal":
                raise UserError(f"model: {run.model} is of the kind {told['kind']!r}; only PAL has users")
            trained, told = load_head(folder, told), {**told, "name": name}
        base = build(told.get("base", run.model))
        if not isinstance(base, TwoTowers):
            raise UserError(f"model: {run.model}: {run.tune} needs a CLIP-style scorer's features")
        base.to(device)
        features = Features.of(base, data, output, progress)
        other = Features.of(base, test, output, progress) if test is not None else features
        seen = sorted({data.users[row] for row in rows})
        if trained is not None:
            assert isinstance(trained, PAL)
            new = [user for user in seen if user not in told["users"]]
            if not new:
                raise UserError(f"{run.data.path}: the scorer {run.model} knows all of its users")
            head: nn.Module = trained
            with_users(trained, len(new))
            told["users"] = [*told["users"], *new]
        else:
            weights = base.version.rpartition(", ")[2]
            told |= {"kind": run.tune, "base": _from_anywhere(run.model), "base_weights": weights}
            told["width"] = features.width
            if run.tune == "pal":
                told |= {"users": seen, "pal": dataclasses.asdict(run.pal)}
            head = make_head(told)
        head.to(device)
        users = told["users"]
        return cls(FrozenFeatures(head, features, users), FrozenFeatures(head, other, users), test, told)

    @torch.no_grad()
    def scores(self, preferences: Preferences, rows: Sequence[int], device: torch.device) -> Tensor:
        """Scores of all candidates of these groups, one after another."""
        policy = self.test_policy if preferences is self.test else self.policy
        found = []
        for start in range(0, len(rows), EVALUATION_BATCH):
            batch = policy.batch(preferences, rows[start : start + EVALUATION_BATCH])
            found.append(policy.network(**{key: value.to(device) for key, value in batch.items()}).float().cpu())
        return torch.cat(found)

    def save(self, run: ScorerRun, folder: Path) -> None:
        """Write the scorer as `trained:` reads it, atomically."""
        with atomic_folder(folder) as temporary:
            if isinstance(self.policy, WholeClip):
                self.policy.save(temporary / CLIP)
            else:
                state = self.policy.network.state_dict()
                save_file({key: value.cpu().contiguous() for key, value in state.items()}, temporary / HEAD)
            write_json(temporary / METADATA, self.told)


def with_users(head: PAL, count: int) -> None:
    """Add rows of w, where the known users are on average, and leave nothing else to train."""
    head.requires_grad_(False)
    start = head.w.mean(0, keepdim=True).repeat(count, 1)
    known = len(head.w)
    head.w = nn.Parameter(torch.cat([head.w.detach(), start]))

    def only_new(gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[:known]), gradient[known:]])

    head.w.register_hook(only_new)


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
    """Raise UserError for data of which this loss, or this kind of model, learns nothing."""
    if run.loss not in losses.LEARN_FROM_TIES and not any(data.labels[row].unique().numel() > 1 for row in rows):
        wants = " or ".join(losses.LEARN_FROM_TIES)
        raise UserError(
            f"{run.data.path}: only ties to train on, of which {run.loss} learns nothing; loss={wants} does"
        )
    if run.tune in ("pal", "users") and all(data.users[row] == NO_USER for row in rows):
        raise UserError(f"{run.data.path}: names no users, whom tune={run.tune} is about; linear or lora need none")


def balance(kind: str, data: Preferences, rows: Sequence[int]) -> dict[int, float]:
    """Each group's weight by its row: 1 over the number of groups of its prompt or user."""
    if kind == "none":
        return dict.fromkeys(rows, 1.0)
    of = data.prompts if kind == "prompt" else data.users
    counts = Counter(of[row] for row in rows)
    return {row: 1.0 / counts[of[row]] for row in rows}


def measure(scores: Tensor, labels: Sequence[Tensor], prompts: Sequence[str]) -> Accuracy:
    """Pair accuracy of scores [N] of groups one after another."""
    won, lost, owner = [], [], []
    for group, (r, label) in enumerate(zip(scores.split([len(x) for x in labels]), labels, strict=True)):
        for i, j in pairs(label):
            won.append(float(r[i]))
            lost.append(float(r[j]))
            owner.append(prompts[group])
    found = compare(lost, won, np.unique(np.array(owner, dtype=str), return_inverse=True)[1])
    return Accuracy(pairs=found.n, prompts=found.prompts, accuracy=found.win_rate, interval=found.win_rate_ci)


def pairs(labels: Tensor) -> Iterator[tuple[int, int]]:
    """(better, worse) of all candidates that differ."""
    yield from map(tuple, (labels[:, None] > labels[None, :]).nonzero().tolist())


def _from_anywhere(spec: str) -> str:
    """A spec whose path, if it ends in one, does not depend on where the command is run."""
    kind, _, rest = spec.rpartition(":")
    return f"{kind}:{Path(rest).expanduser().absolute()}" if kind and Path(rest).expanduser().exists() else spec
