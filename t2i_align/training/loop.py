"""The one training loop: distribution, accumulation, clipping, averaging, logging, checkpoints, divergence.

It knows no method, model family or data; these are a `task.Task`. Users: `trainer` and `reward_models.train`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from t2i_align.config import RunConfig
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.training import checkpoint, sharding
from t2i_align.training.monitor import (
    Callbacks,
    Diverged,
    MetricAverager,
    arriving,
    check_finite,
    check_reached,
    check_winners,
    drifted,
)
from t2i_align.training.optimizer import make_optimizer
from t2i_align.training.progress import Progress, flat
from t2i_align.training.task import Task
from t2i_align.training.weights import older_policy
from t2i_align.utils.files import append_line
from t2i_align.utils.signals import graceful_shutdown
from t2i_align.utils.tensors import whole

if TYPE_CHECKING:
    from t2i_align.reward_models.config import ScorerRun

METRICS_FILE = "metrics.jsonl"


class Loop:
    """Trains a task to `config.train.steps` in `config.output_dir`, from the newest checkpoint if `config.resume`.

    settings: the run's as plain values, for trackers.

    Raises:
        UserError: the checkpoint cannot be continued; see `checkpoint.load` and `checkpoint.check_continues`.
    """

    def __init__(
        self,
        task: Task,
        accelerator: Accelerator,
        config: RunConfig | ScorerRun,
        progress: bool = True,
        callbacks: Callbacks | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.accelerator, self.settings = task, accelerator, settings or {}
        self.callbacks = callbacks or Callbacks()
        self.train, self.optim, self.log = config.train, config.optim, config.log
        self.output = Path(config.output_dir)
        self.groups_per_step = config.train.batch_size * task.accumulate * accelerator.num_processes
        self.weights, self.parameters = task.weights, list(task.weights.policy.values())
        optimizer = make_optimizer(config.optim, self.parameters)
        # Of this optimizer, not the prepared one, which would step once a process.
        self.schedule = get_scheduler(
            config.optim.schedule,
            optimizer,
            num_warmup_steps=config.optim.warmup_steps,
            num_training_steps=config.train.steps,
        )
        self.ema: EMAModel | None = None
        if config.optim.ema is not None:
            self.weights.variants["ema"] = average = older_policy(self.weights)
            self.ema = EMAModel(self.parameters, decay=config.optim.ema, foreach=True)
            self.ema.shadow_params = sharding.local(list(average.tensors.values()))
        self.same = {"data": task.fingerprint, "base model": task.weights.base_hash}
        self.sharded = sharding.is_sharded(accelerator)  # in place, when the weights were named
        self.network = task.weights.network if self.sharded else accelerator.prepare_model(task.weights.network)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.step = self.rollbacks = 0
        self.checked = False  # whether a step's gradient is known to reach what is trained
        self.went_back = False  # whether a rollback has led here
        self.update_norm = torch.zeros(())  # of the last logged step
        self.window = MetricAverager()  # of the metrics since the last logged line
        self.last_logged: dict[str, float] = {}
        self.resumed = config.resume and self._resume()
        passes = self.groups_per_step / task.groups if task.groups else None
        shown = progress and accelerator.is_main_process
        self.progress = Progress(self.output, self.step, self.train.steps, passes, shown=shown)

    def run(self) -> dict[str, float]:
        """Train to the configured step; returns the last logged metrics.

        Raises:
            UserError: the run has diverged too often. KeyboardInterrupt: it was interrupted, and its state is saved.
        """
        if self.log.trackers:
            folder = Path(self.accelerator.project_dir)
            options = {"wandb": {"dir": str(folder), "name": folder.name}}
            self.accelerator.init_trackers(self.log.project, flat(self.settings), init_kwargs=options)
        if not self.resumed:
            for act in self.task.due(0, False):
                self._record(act())
            self._save()  # what a run that diverges early goes back to; a full disk shows now, not hours later
        with self.progress.logging(), graceful_shutdown() as stop:
            while self.step < self.train.steps and not self.task.over:
                try:
                    self._train(stop)
                except Diverged as divergence:
                    self._roll_back(divergence)
        return self.last_logged

    def _train(self, stop: threading.Event) -> None:
        """From here to the configured step, or until the run diverges."""
        batches = self.task.batches(self.step)
        self.progress.start(self.step)
        self.network.train()  # not in each step: a walk over a large network takes milliseconds
        before: Callable[[], list[float]] | None = None
        while self.step < self.train.steps and not self.task.over:
            last = self.step + 1 == self.train.steps
            report = (self.step + 1) % self.log.every == 0 or last
            numbers = self._one_step(batches, report, stop)
            # Those of the step before have arrived, so that the host goes on while the device is at this one.
            stopping = bool(before and self._check(before(), self.step - 1))
            if self.accelerator.num_processes == 1:
                stopping = stop.is_set()
            before = numbers
            self.progress.go_to(self.step)
            save = self.step % self.log.checkpoint_every == 0 or last or stopping
            due = self.task.due(self.step, last)
            if report or save or due:
                self._check(numbers(), self.step)
            if report or save:
                means = {**self.window.numbers(self.accelerator), **self.task.watched()}
                check_winners(means, self.step, self.task.health.max_error_rise)
                self.task.over = self.task.over or drifted(means, self.task.health.max_drift)
            if report:
                now = {"update_norm": float(self.update_norm), "lr": float(self.schedule.get_last_lr()[0])}
                now |= self.progress.measured(self.step, self.accelerator.device)
                self.last_logged, self.window = {**means, **now}, MetricAverager()
                self._record(self.last_logged)
            if self.callbacks.on_step and self.accelerator.is_main_process:
                self.callbacks.on_step(self.step, self.last_logged if report else {})
            for act in due:
                self._record(act())
            if self.task.over and self.accelerator.is_main_process:
                append_line(self.output / METRICS_FILE, {"step": self.step, "ended": self.task.over})
                self.progress.say(f"The run ends after step {self.step}: {self.task.over}.")
            if save or self.task.over:
                self.went_back = False
                self._save(stopping=stopping, last=last or bool(self.task.over))
            if stopping and not last and not self.task.over:
                raise KeyboardInterrupt(f"stopped after step {self.step}; its checkpoint is saved")

    def _one_step(self, batches: Iterator[Any], report: bool, stop: threading.Event) -> Callable[[], list[float]]:
        """Train one step; what `_check` takes, on its way from the device."""
        # Reseeded each step (for LoRA dropout), so that a resumed run does not depend on what ran before.
        torch.manual_seed(stable_seed(self.train.seed, "step", self.step, self.accelerator.process_index))
        metrics, total = MetricAverager(), torch.zeros((), device=self.accelerator.device)
        for micro in range(self.task.accumulate):
            batch = next(batches)
            hold = nullcontext() if micro == self.task.accumulate - 1 else self.accelerator.no_sync(self.network)
            with hold:
                with self.accelerator.autocast():
                    loss, values = self.task.losses(self.network, batch)
                self.accelerator.backward(loss.mean() / self.task.accumulate)
            total += loss.detach().mean() / self.task.accumulate
            metrics.add({"loss": loss, **values})
        if not self.checked:
            check_reached(self.weights.policy, self.accelerator.num_processes)
            self.checked = True
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.optim.max_grad_norm)
        before = [parameter.detach().clone() for parameter in self.parameters] if report else []
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if report:
            torch._foreach_sub_(before, [parameter.detach() for parameter in self.parameters])  # needs no third copy
            self.update_norm = whole(torch.nn.utils.get_total_norm(before))
        self.schedule.step()
        if self.ema:
            self.ema.step(sharding.local(self.parameters))
        norm = torch.as_tensor(whole(norm), device=total.device).detach()
        if self.optimizer.step_was_skipped:  # fp16: the scaler met an infinite gradient, took no step and backs off
            norm = torch.zeros_like(norm)
        self.task.stepped(lambda: metrics.means(self.accelerator))
        metrics.add({"grad_norm": norm.view(1)})
        self.window.merge(metrics)
        self.step += 1
        # Of all processes, so that all stop where one has met a bad number or a signal.
        stopped = torch.full_like(total, stop.is_set())
        return arriving(self.accelerator.reduce(torch.stack([total, norm.to(total.dtype), stopped]), reduction="mean"))

    def _check(self, numbers: list[float], step: int) -> bool:
        """Raise Diverged where loss or gradient norm of a step are not finite; whether a process was told to stop."""
        loss, norm, stopped = numbers
        check_finite(loss, norm, step)
        return stopped > 0

    def _record(self, metrics: dict[str, float]) -> None:
        if metrics and self.accelerator.is_main_process:
            self.accelerator.log(metrics, step=self.step)
            append_line(self.output / METRICS_FILE, {"step": self.step, **metrics})
            self.progress.report(self.step, metrics)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _resume(self) -> bool:
        """Continue from the newest complete checkpoint; whether there is one."""
        if saved := checkpoint.all_steps(self.output):
            weights, state = self._load(saved[-1])
            checkpoint.check_continues(saved[-1], state, self.same, self.groups_per_step, self.train.steps)
            self._restore(weights, state)
        if self.accelerator.is_main_process:
            lines = checkpoint.truncate_lines(self.output / METRICS_FILE, self.step if saved else -1)
            self.last_logged = next((line for line in reversed(lines) if "loss" in line), {})
            self.last_logged.pop("step", None)
        self.accelerator.wait_for_everyone()
        return bool(saved)

    def _roll_back(self, divergence: Diverged) -> None:
        """Back to the last good checkpoint with half the learning rate; an error when that has been done enough.

        Nothing is saved: a run that is killed before the next checkpoint diverges and rolls back in the same way again.
        """
        limit, saved = self.task.health.rollbacks, checkpoint.all_steps(self.output)
        if self.rollbacks >= limit:
            again = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise UserError(
                f"{divergence}{again}, so the run has stopped. The last good checkpoint is {saved[-1]}. "
                f"{self.task.advice}"
            )
        # Where the newest has led to divergence once more, it was spoilt before anything showed.
        spoilt = saved.pop() if self.went_back and len(saved) > 1 else None
        rollbacks = self.rollbacks + 1
        self._restore(*self._load(saved[-1]))
        factor = 0.5 ** (rollbacks - self.rollbacks)  # from here on: schedule and optimiser keep it in their state
        self.schedule.base_lrs = [rate * factor for rate in self.schedule.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        self.rollbacks, self.went_back = rollbacks, True
        self.progress.go_to(self.step)
        self.accelerator.wait_for_everyone()  # all have listed and read the checkpoints
        if self.accelerator.is_main_process:
            if spoilt:
                checkpoint.remove(spoilt)
            record = {"step": self.step, "rollback": rollbacks, "diverged_at": divergence.step}
            # It is there already if the run was killed before the next checkpoint.
            if record not in checkpoint.truncate_lines(self.output / METRICS_FILE, self.step):
                append_line(self.output / METRICS_FILE, record)
            self.progress.say(
                f"{divergence}. The run goes back to {saved[-1]} and on with {0.5**rollbacks:g} times the learning "
                f"rate (rollback {rollbacks} of at most {limit})."
            )
        self.accelerator.wait_for_everyone()

    @property
    def _parts(self) -> dict[str, Any]:
        """What keeps a state of its own between steps."""
        scaler = {"scaler": self.accelerator.scaler} if self.accelerator.scaler else {}
        return {"optimizer": self.optimizer, "schedule": self.schedule, **scaler}

    def _save(self, stopping: bool = False, last: bool = False) -> None:
        window, weights = self.window.reduced(self.accelerator), self.weights.state()
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        shards: Path | None = None
        if self.sharded:
            shards = checkpoint.save_shards(self.output, self.accelerator, weights, parts["optimizer"])
        with self.task.exporting(whole=stopping):
            if self.accelerator.is_main_process:
                state: dict[str, Any] = {
                    **parts,
                    "rollbacks": self.rollbacks,
                    "window": window,
                    "task": self.task.state(),
                    "same": self.same,
                    "groups_per_step": self.groups_per_step,
                }
                export = self.task.export if self.step else None  # at first there is nothing to use
                keep = self.log.keep_checkpoints
                saved = checkpoint.save(self.output, self.step, shards or weights, state, keep, export)
                if export and not last:  # when the run has ended, it writes that itself
                    export(self.output, whole=stopping)
                if self.callbacks.on_save:
                    self.callbacks.on_save(self.step, saved)
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return checkpoint.load(folder, self.weights.state(), self.parameters)

    def _restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.weights.load_state(weights)
        states = state["optimizer"]["state"]
        for i, values in states.items():
            like = self.parameters[i]
            states[i] = {key: sharding.placed(value, like) for key, value in values.items()}
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        device = self.accelerator.device
        self.window = MetricAverager({name: value.to(device) for name, value in state["window"].items()})
        self.task.load_state(state["task"])
        self.step, self.rollbacks = state["step"], state["rollbacks"]
        if self.ema:
            self.ema.optimization_step = self.step
