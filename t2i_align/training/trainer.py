"""Aligning a denoiser, as a task of the loop: data, noise and an objective make the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from t2i_align.conditioning.adapter import TRAINED
from t2i_align.config import RunConfig
from t2i_align.data.batch import Batch, Model
from t2i_align.data.loader import PreferenceDataset
from t2i_align.diffusion.noising import drop_captions
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.inference.options import PRECISIONS
from t2i_align.objectives.base import Metrics, Objective
from t2i_align.training.checkpoint import KEPT, name_of, writing
from t2i_align.training.guards import Best
from t2i_align.training.monitor import MetricAverager
from t2i_align.training.reference import Reference, ReferenceUpdate, Winners
from t2i_align.training.report import write_report
from t2i_align.training.sharding import is_sharded
from t2i_align.training.stored_errors import RecallingReference, StoredErrors
from t2i_align.training.task import Task
from t2i_align.training.weights import dropout_off

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from t2i_align.training.rewards import Rewarder

WATCHED = 8  # winners whose error is measured at each logged step


class Alignment(Task):
    """A denoiser (or the adapter on it) under an objective.

    Args:
        reference: built from the base weights (see `build_reference`), of the pipeline that is trained.
        validate: called with pipeline and step on the main process; its numbers are logged.
        rewarder: for objectives with a scorer.
        errors: the reference's, where they are stored.
        held_out: preferences that are not trained on, to be measured at each validation.
    """

    advice = "A smaller optim.lr, a larger objective.beta, or train.precision=bf16 instead of fp16, usually helps."

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        reference: Reference,
        source: PreferenceDataset,
        validate: Callable[[TrainablePipeline, int], dict[str, float]] | None = None,
        rewarder: Rewarder | None = None,
        errors: StoredErrors | None = None,
        held_out: PreferenceDataset | None = None,
    ) -> None:
        self.config, self.accelerator, self.source = config, accelerator, source
        self.reference, self.pipeline, self.validate = reference, reference.pipeline, validate
        self.rewarder, self.errors, self.held_out = rewarder, errors, held_out
        self.weights, self.fingerprint = reference.weights, source.fingerprint
        self.groups = source.counts.get("groups")
        self.accumulate, self.health = config.train.accumulate, config.health
        patience = config.validation.patience
        self.best = Best(self.weights, patience) if validate and patience else None
        self.update: ReferenceUpdate | None = None
        if config.train.reference_update is not None:
            self.update = ReferenceUpdate(config, accelerator, source, reference)
        self.winners: Winners | None = None  # whose error is watched where the objective has no reference
        needs = config.objective.needs
        if not (needs.reference or needs.scorer) and config.health.max_error_rise is not None:
            self.winners = Winners(config, accelerator, source, self.pipeline, WATCHED)
        # In single precision on the device, so that updating it waits for nothing.
        self.objective_state = {
            name: torch.tensor(value, dtype=torch.float32, device=accelerator.device)
            for name, value in config.objective.initial_state().items()
        }
        self.empty = source.empty_conditioning(accelerator.device)

    def batches(self, step: int) -> Iterator[tuple[Batch, SampleRNG]]:
        train = self.config.train
        items: Iterator[Any] = self.source.loader(
            seed=train.seed,
            start_step=step,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.data.workers,
        )
        return map(self._batch, items)

    def _batch(self, item: Any) -> tuple[Batch, SampleRNG]:
        train, device = self.config.train, self.accelerator.device
        batch = self.source.to_batch(item, device)
        rng = SampleRNG(train.seed, batch.keys, self.pipeline.process, train.timestep_sampling, device)
        batch = drop_captions(batch, self.empty, rng, train.caption_dropout)
        return replace(batch, empty=self.empty, state=self.objective_state, rewarder=self.rewarder), rng

    def losses(self, network: nn.Module, batch: tuple[Batch, SampleRNG]) -> tuple[Tensor, Metrics]:
        policy = partial(self.pipeline.predict, denoiser=network)
        reference: Model = self.reference
        if self.errors is not None:
            reference = RecallingReference(self.reference, self.errors, batch[0].keys, batch[1].moved)
        return checked(self.config.objective.step(policy, reference, *batch), batch[0], self.config.objective)

    def stepped(self, means: Callable[[], dict[str, Tensor]]) -> None:
        if self.objective_state:
            self.objective_state = self.config.objective.update_state(self.objective_state, means())

    def due(self, step: int, last: bool) -> Sequence[Callable[[], dict[str, float]]]:
        every = self.config.validation.every
        out: list[Callable[[], dict[str, float]]] = []
        if self.update and self.update.due(step):
            out.append(self.update.follow)
        if self.winners and self.winners.initial is None:
            out.append(self._measure_winners)
        if every and (step % every == 0 or last):
            out += [partial(self._validate, step)] if self.validate else []
            out += [self._on_held_out] if self.held_out else []
        if step and (keep := self.config.log.keep_weights) and step % keep == 0:
            out.append(partial(self._keep, step))
        if self.accelerator.is_main_process and (out or step % self.config.log.checkpoint_every == 0):
            out.append(self._report)
        return out

    def export(self, folder: Path, whole: bool = False) -> Path | None:
        """Write the LoRA, the soft tokens or (if `whole`) the model into `folder`, in a folder of that name."""
        name = self.config.trains
        if name == "model" and not whole:
            return None
        lora = self.config.lora
        with self.weights.using(self.weights.result), writing(folder / name) as temporary:
            written = TRAINED[name].save(self.pipeline, temporary, PRECISIONS[lora.save_precision] if lora else None)
        return folder / name / written.relative_to(temporary)

    def exporting(self, whole: bool = False) -> AbstractContextManager[None]:
        model = self.config.trains == "model"
        if model and not whole:
            return nullcontext()
        return self.weights.gathered(keep=self.accelerator.is_main_process, everything=model)

    def _keep(self, step: int) -> dict[str, float]:
        with self.exporting(whole=True):
            if self.accelerator.is_main_process:
                self.export(Path(self.config.output_dir) / KEPT / name_of(step), whole=True)
        self.accelerator.wait_for_everyone()
        return {}

    def watched(self) -> dict[str, float]:
        if self.winners is None or self.winners.initial is None:
            return {}
        return dict(zip(("winners/error", "winners/rise"), self.winners.means(), strict=True))

    def _measure_winners(self) -> dict[str, float]:
        assert self.winners is not None
        self.winners.initial = self.winners.errors()
        return {}

    def _validate(self, step: int) -> dict[str, float]:
        scores: dict[str, float] = {}
        if self.validate and (self.accelerator.is_main_process or is_sharded(self.accelerator)):
            with self.weights.using(self.weights.result):
                scores = self.validate(self.pipeline, step)
        self.accelerator.wait_for_everyone()
        if self.best:
            name, value = next(iter(scores.items()), ("", 0.0))  # of the main process, whose first scorer decides
            value = float(broadcast(torch.tensor(value, device=self.accelerator.device)))
            self.over = self.over or self.best.see(name, value, step)
        return scores

    @torch.no_grad()
    def _on_held_out(self) -> dict[str, float]:
        """The objective's metrics on held-out preferences, always the same with the same noise; all processes agree."""
        assert self.held_out is not None
        train, count, found = self.config.train, self.config.validation.pairs, MetricAverager()
        items: Iterator[Any] = self.held_out.loader(seed=train.seed, start_step=0, batch_size=train.batch_size)
        with self.weights.using(self.weights.result) as network, dropout_off(network).using():
            policy = partial(self.pipeline.predict, denoiser=network)
            for start in range(0, count, train.batch_size):
                batch = self.held_out.to_batch(next(items), self.accelerator.device)
                device, process = self.accelerator.device, self.pipeline.process
                rng = SampleRNG(train.seed, batch.keys, process, train.timestep_sampling, device)
                batch = replace(batch, empty=self.empty, state=self.objective_state)
                with self.accelerator.autocast():
                    loss, metrics = self.config.objective.step(policy, self.reference, batch, rng)
                found.add({name: values[: count - start] for name, values in {"loss": loss, **metrics}.items()})
        numbers = found.numbers(self.accelerator)
        return {f"held_out/{name}": value for name, value in numbers.items() if "/t" not in name}

    def _report(self) -> dict[str, float]:
        write_report(Path(self.config.output_dir))
        return {}

    def state(self) -> dict[str, Any]:
        return {
            "objective": self.objective_state,
            "reference": self.update.state() if self.update else None,
            "winners": self.winners.initial if self.winners else None,
            "rewarder": self.rewarder.state() if self.rewarder else None,
            "best": self.best.state() if self.best else None,
            "over": self.over,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        device = self.accelerator.device
        self.objective_state = {name: value.to(device) for name, value in state["objective"].items()}
        if self.update:
            self.update.load_state(state["reference"])
        if self.winners:
            self.winners.load_state(state["winners"])
        if self.rewarder:
            self.rewarder.load_state(state["rewarder"])
        if self.best and state["best"]:
            self.best.load_state(state["best"])
        self.over = state["over"]


def checked(result: Any, batch: Batch, objective: Objective) -> tuple[Tensor, Metrics]:
    """What `Objective.step` returned; raises UserError unless it is a loss [B] with a gradient and metrics [B] each."""
    name, expected = f"objective {objective.name!r}", [len(batch.keys)]
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise UserError(f"{name}: `step` must return a loss and a mapping of metrics, found {type(result).__name__}")
    loss, metrics = result
    for key, value in {"the loss": loss, **{f"metric {key!r}": value for key, value in metrics.items()}}.items():
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if found != expected:
            raise UserError(f"{name}: {key} must be a tensor of shape {expected}, one number a group, found {found}")
    if not loss.requires_grad:
        raise UserError(f"{name}: the loss has no gradient: it does not depend on what `policy` predicts")
    return loss, metrics
