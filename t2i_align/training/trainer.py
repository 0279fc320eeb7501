"""The one loop: distribution, accumulation, clipping, averaging, logging, checkpoints. It knows no method or family."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from t2i_align.config import RunConfig
from t2i_align.data.loader import PreferenceDataset
from t2i_align.data.schema import Model
from t2i_align.diffusion.noising import drop_captions
from t2i_align.diffusion.randomness import SampleRNG, stable_seed
from t2i_align.errors import UserError
from t2i_align.training import checkpoint
from t2i_align.training.divergence import Diverged, change, check_finite, check_winners, copies
from t2i_align.training.monitor import MetricAverager
from t2i_align.training.optim import averaged_weights, make_optimizer, make_schedule, scale_rate
from t2i_align.training.reference import UpdatableReference
from t2i_align.training.reference_update import ReferenceUpdate
from t2i_align.training.signals import graceful_shutdown

if TYPE_CHECKING:
    from pipelines import TrainablePipeline

Validate = Callable[["TrainablePipeline", int], dict[str, float]]
METRICS_FILE = "metrics.jsonl"
EMA_PREFIX = "ema."


class Trainer:
    """Trains a pipeline's denoiser (or the LoRA on it) on a source under an objective.

    Args:
        config: the run.
        pipeline: with gradients switched on for what is to be trained, on the accelerator's device.
        reference: built from the base weights (see `build_reference`).
        validate: called with pipeline and step on the main process; its numbers are logged.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        pipeline: TrainablePipeline,
        reference: Model,
        source: PreferenceDataset,
        validate: Validate | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.accelerator, self.pipeline, self.source = config, accelerator, pipeline, source
        self.reference, self.validate, self.progress = reference, validate, progress
        self.output = Path(config.output_dir)
        self.parameters = {name: p for name, p in pipeline.denoiser.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(config.optim, list(self.parameters.values()))
        # Of this optimizer, not the prepared one, which would step once a process.
        self.schedule = make_schedule(config.optim, optimizer, config.train.steps)
        ema = config.optim.ema
        self.ema = None if ema is None else EMAModel(self.parameters.values(), decay=ema)
        self.model, self.optimizer = accelerator.prepare(pipeline.denoiser, optimizer)
        self.moving: ReferenceUpdate | None = None
        if config.train.reference_update is not None:
            self.moving = ReferenceUpdate(config, accelerator, source, cast(UpdatableReference, reference))
        self.step = self.rollbacks = 0
        self.went_back = False  # whether a rollback has led here
        self.resumed = False
        self.update_norm = torch.zeros(())  # of the last logged step
        self.window = MetricAverager()  # of the metrics since the last logged line
        # In single precision on the device, so that updating them waits for nothing.
        self.state = {
            name: torch.tensor(value, dtype=torch.float32, device=accelerator.device)
            for name, value in config.objective.initial_state().items()
        }
        self.last_logged: dict[str, float] = {}

    def policy(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The model being trained, as objectives see it."""
        return self.pipeline.predict(noisy_latents, timesteps, conditioning, denoiser=self.model)

    @property
    def groups_per_step(self) -> int:
        """How many groups one optimiser step takes, over all processes."""
        train = self.config.train
        return train.batch_size * train.accumulate * self.accelerator.num_processes

    def run(self) -> dict[str, float]:
        """Train to the configured step; returns the last logged metrics."""
        empty = self.source.empty_conditioning(self.accelerator.device)
        bar = tqdm(
            initial=self.step,
            total=self.config.train.steps,
            desc="train",
            disable=not (self.progress and self.accelerator.is_main_process),
        )
        if not self.resumed:
            self._validate()
            if self.moving:
                self.moving.begin()
            self._save()  # what a run that diverges early goes back to; and a full disk is noticed before, not after
        with bar, graceful_shutdown() as stop:
            while self.step < self.config.train.steps:
                try:
                    self._train(empty, bar, stop)
                except Diverged as divergence:
                    self._roll_back(divergence)
                    bar.n = self.step
        return self.last_logged

    def _train(self, empty: dict[str, Tensor], bar: tqdm[Any], stop: threading.Event) -> None:
        """From here to the configured step, or until the run diverges."""
        log, every = self.config.log, self.config.validation.every
        items = self._items()
        previous: Tensor | None = None
        while self.step < self.config.train.steps:
            last = self.step + 1 == self.config.train.steps
            report = (self.step + 1) % log.every == 0 or last
            numbers = self._one_step(items, empty, report)
            # The step before is checked, not this one: its numbers are ready, so nothing waits for the device.
            check_finite(previous, self.step - 1)
            previous = numbers
            bar.update()
            validate = bool(every) and (self.step % every == 0 or last)
            stopping = self._agreed(stop.is_set(), report)
            save = self.step % log.checkpoint_every == 0 or last or stopping
            moving = self.moving if self.moving and self.moving.due(self.step) else None
            if report or validate or save or moving:
                check_finite(numbers, self.step)
            if report or save:
                means = self.window.numbers(self.accelerator)
                check_winners(means, self.step, self.config.health.max_error_rise)
            if report:
                self._log(means)
                bar.set_postfix(loss=f"{means['loss']:.4f}")
            if moving:
                self._record(moving.follow(self.parameters))
            if validate:
                self._validate()
            if save:
                self.went_back = False
                self._save()
            if stopping and not last:
                raise KeyboardInterrupt(f"stopped after step {self.step}; its checkpoint is saved")

    def _roll_back(self, divergence: Diverged) -> None:
        """Back to the last good checkpoint with half the learning rate; an error when that has been done enough."""
        limit, saved = self.config.health.rollbacks, checkpoint.all_steps(self.output)
        if self.rollbacks >= limit:
            again = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise UserError(
                f"{divergence}{again}, so the run has stopped. The last good checkpoint is {saved[-1]}. "
                "A smaller optim.lr or objective.beta, or train.precision=bf16 instead of fp16, usually helps."
            )
        # Where the newest has led to divergence once more, it was spoilt before anything showed.
        good = saved[-2] if self.went_back and len(saved) > 1 else saved[-1]
        rollbacks = self.rollbacks + 1
        self._restore(*checkpoint.load(good))
        scale_rate(self.schedule, 0.5 ** (rollbacks - self.rollbacks))
        self.rollbacks, self.went_back = rollbacks, True
        self.accelerator.wait_for_everyone()  # all have read what is now written anew
        if self.accelerator.is_main_process:
            metrics = self.output / METRICS_FILE
            record = {"step": self.step, "rollback": rollbacks, "diverged_at": divergence.step}
            if record not in checkpoint.truncate_lines(metrics, self.step):  # as of a run killed in the next line
                checkpoint.append_line(metrics, record)
            tqdm.write(
                f"{divergence}. The run goes back to {good} and on with {0.5**rollbacks:g} times the learning rate "
                f"(rollback {rollbacks} of at most {limit})."
            )
        self._save()
        if self.accelerator.is_main_process and good != saved[-1]:
            shutil.rmtree(saved[-1])
        self.accelerator.wait_for_everyone()

    def averaged(self) -> Any:
        """A context in which the denoiser holds the averaged weights, if there are any."""
        return averaged_weights(self.ema, list(self.parameters.values())) if self.ema else nullcontext()

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        steps = checkpoint.all_steps(self.output)
        if steps:
            weights, state = checkpoint.load(steps[-1])
            if state["data"] != self.source.fingerprint:
                raise UserError(
                    f"{self.output}: the data has changed since {steps[-1].name} was saved; "
                    "resume needs the same data, or choose another output_dir"
                )
            if state["groups_per_step"] != self.groups_per_step:
                raise UserError(
                    f"{self.output}: a step of this run takes {state['groups_per_step']} groups; train.batch_size x "
                    f"train.accumulate x processes is {self.groups_per_step} now. Choose them so that the product is "
                    "the same, and every sample is seen exactly once."
                )
            if state["step"] > self.config.train.steps:
                raise UserError(
                    f"{self.output}: {steps[-1].name} is beyond train.steps={self.config.train.steps}; "
                    "remove the later checkpoints to go back"
                )
            self._restore(weights, state)
            self.resumed = True
        if self.accelerator.is_main_process:
            metrics = checkpoint.truncate_lines(self.output / METRICS_FILE, self.step if steps else -1)
            self.last_logged = next((line for line in reversed(metrics) if "loss" in line), {})
            self.last_logged.pop("step", None)
        self.accelerator.wait_for_everyone()

    def _one_step(self, items: Iterator[Any], empty: dict[str, Tensor], report: bool) -> Tensor:
        """Train one step; the loss and the gradient's norm, [2], for the check that both are finite."""
        train, accumulate = self.config.train, self.config.train.accumulate
        # Reseeded each step (for LoRA dropout), so that a resumed run does not depend on what ran before.
        torch.manual_seed(stable_seed(train.seed, "step", self.step, self.accelerator.process_index))
        self.model.train()
        tally, total = MetricAverager(), torch.zeros((), device=self.accelerator.device)
        for micro in range(accumulate):
            batch = self.source.to_batch(next(items), self.accelerator.device)
            draw = SampleRNG(
                train.seed, batch.keys, self.pipeline.process, train.timestep_sampling, self.accelerator.device
            )
            batch = drop_captions(batch, empty, draw, train.caption_dropout)
            batch = replace(batch, empty=empty, state=self.state)
            hold = nullcontext() if micro == accumulate - 1 else self.accelerator.no_sync(self.model)
            with hold:
                with self.accelerator.autocast():
                    loss, metrics = self.config.objective.step(self.policy, self.reference, batch, draw)
                self.accelerator.backward(loss.mean() / accumulate)
            total += loss.detach().mean() / accumulate
            tally.add({"loss": loss, **metrics})
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.optim.max_grad_norm)
        before = copies(list(self.parameters.values())) if report else []
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if report:
            self.update_norm = change(before, list(self.parameters.values()))
        self.schedule.step()
        if self.ema:
            self.ema.step(self.parameters.values())
        norm = torch.as_tensor(norm, device=total.device).detach()
        if self.optimizer.step_was_skipped:  # fp16: the scaler met an infinite gradient, took no step and backs off
            norm = torch.zeros_like(norm)
        if self.state:
            self.state = self.config.objective.update_state(self.state, tally.means(self.accelerator))
        tally.add({"grad_norm": norm.view(1)})
        self.window.merge(tally)
        self.step += 1
        # Of all processes, so that all stop where one has met a bad number.
        return self.accelerator.reduce(torch.stack([total, norm.to(total.dtype)]), reduction="mean")

    def _items(self) -> Iterator[Any]:
        train = self.config.train
        return self.source.loader(
            seed=train.seed,
            start_step=self.step,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.data.workers,
        )

    def _log(self, means: dict[str, float]) -> None:
        """A line with the means since the last one."""
        now = {"update_norm": float(self.update_norm), "lr": float(self.schedule.get_last_lr()[0])}
        self.last_logged, self.window = {**means, **now}, MetricAverager()
        self._record(self.last_logged)

    def _record(self, metrics: dict[str, float]) -> None:
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:
            checkpoint.append_line(self.output / METRICS_FILE, {"step": self.step, **metrics})

    def _validate(self) -> None:
        if self.validate is None or not self.config.validation.every:
            return
        if self.accelerator.is_main_process:
            with self.averaged():
                self._record(self.validate(self.pipeline, self.step))
        self.accelerator.wait_for_everyone()

    def _agreed(self, stop: bool, report: bool) -> bool:
        """Whether to stop now. Several processes hear a signal at different steps, so they agree when they log."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        return report and bool(self.accelerator.reduce(flag, reduction="sum"))

    def _save(self) -> None:
        window = self.window.reduced(self.accelerator)
        if self.accelerator.is_main_process:
            weights: dict[str, Tensor] = dict(self.parameters)
            state: dict[str, Any] = {
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "rollbacks": self.rollbacks,
                "went_back": self.went_back,
                "window": window,
                "objective": self.state,
                "data": self.source.fingerprint,
                "groups_per_step": self.groups_per_step,
            }
            if self.ema:
                averages = zip(self.parameters, self.ema.shadow_params, strict=True)
                weights |= {EMA_PREFIX + name: tensor for name, tensor in averages}
                state["ema_steps"] = self.ema.optimization_step
            if self.moving:
                weights |= self.moving.weights()
                state["reference"] = self.moving.state()
            checkpoint.save(self.output, self.step, weights, state, self.config.log.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        missing = set(self.parameters) - set(weights)
        if missing:
            raise UserError(f"{self.output}: the checkpoint lacks {len(missing)} trained tensors, as {min(missing)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        if self.ema:
            self.ema.shadow_params = [weights[EMA_PREFIX + name].to(p.device) for name, p in self.parameters.items()]
            self.ema.optimization_step = state["ema_steps"]
        if self.moving:
            self.moving.load_state(state["reference"], weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        device = self.accelerator.device
        self.window = MetricAverager({name: value.to(device) for name, value in state["window"].items()})
        self.state = {name: value.to(device) for name, value in state["objective"].items()}
        self.step, self.rollbacks, self.went_back = state["step"], state["rollbacks"], state["went_back"]
