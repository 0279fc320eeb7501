"""The output folder of a run: one run per folder, continued only when asked to."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from t2i_align.config import RunConfig
from t2i_align.errors import UserError
from t2i_align.inference.options import use_precision
from t2i_align.training import checkpoint, sharding
from t2i_align.training.progress import LOG_FILE, write
from t2i_align.utils.files import WRITING, differences, holds, output_lock, write_text
from t2i_align.utils.settings import read_yaml

if TYPE_CHECKING:
    from t2i_align.reward_models.config import ScorerRun

RUN_FILE = "run.yaml"


@contextmanager
def open_run(
    config: RunConfig | ScorerRun,
    settings: Mapping[str, Any],
    *,
    free: Collection[str],
    extra: tuple[str, ...] = (),
) -> Iterator[Accelerator]:
    """Hold `config.output_dir` while a run works in it; yields the run's accelerator.

    Args:
        settings: the run's, as in its run.yaml. free: dotted keys in which a continuation may differ.
        extra: beginnings of files' names that a run may have left before its run.yaml.

    Raises:
        UserError: the folder holds something else, or another run, or this one and `config.resume` is not set.
    """
    output = Path(config.output_dir)
    AcceleratorState._reset_state()  # a second run in one notebook may want another precision
    accelerator = Accelerator(
        # By default, accelerate takes each of several CPU processes for a separate run.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.train.precision if use_precision(config.train.precision) else "no",
        log_with=list(config.log.trackers) or None,
        project_dir=output,
    )
    sharding.start(accelerator, config)
    # The main process holds the folder for all; they wait until it has checked that it may.
    with output_lock(output, first=accelerator.is_main_process):
        try:
            if accelerator.is_main_process:
                _check_output(output, settings, config.resume, free, extra)
            accelerator.wait_for_everyone()
            with _logged(output, accelerator.is_main_process):
                yield accelerator
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # which hold the run's objects
            raise
        finally:
            # Drop DDP's wrapper while the process group still exists: as the last holder of the group it would join
            # gloo's threads with the GIL locked, for which these may wait.
            accelerator.free_memory()
            accelerator.end_training()


@contextmanager
def _logged(output: Path, main: bool) -> Iterator[None]:
    """Note in the run's log, once it has one, what ends the block early."""
    try:
        yield
    except BaseException as error:
        if main and (output / LOG_FILE).is_file():
            write(output, f"stopped: {error or type(error).__name__}")
        raise


def check_same_run(output: Path, settings: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise UserError where the folder holds a run with other settings, naming each key."""
    if not (file := output / RUN_FILE).is_file():
        return
    if keys := differences(read_settings(file), settings, {"output_dir", *free}):
        raise UserError(f"output_dir {output}: this folder holds another run: {'; '.join(keys)}")


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a run.yaml; raises UserError for anything else."""
    settings = read_yaml(file)
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict | str):
        found = "no 'model'" if isinstance(settings, dict) else type(settings).__name__
        raise UserError(f"{file}: expected a run's settings, found {found}")
    return settings


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Write run.yaml, when all that can be wrong has been checked: from here on the folder holds this run."""
    write_text(output / RUN_FILE, yaml.safe_dump(dict(settings), sort_keys=False))


def _check_output(
    output: Path, settings: Mapping[str, Any], resume: bool, free: Collection[str], extra: tuple[str, ...]
) -> None:
    if not holds(output, "run", RUN_FILE, ignored=(WRITING, *extra)):
        return
    if not resume:
        steps = checkpoint.all_steps(output)
        state = f"its newest checkpoint is {steps[-1].name}" if steps else "it has no checkpoint yet"
        raise UserError(
            f"output_dir {output}: this folder holds a run already ({state}). "
            "Add resume=true to continue it, or choose another output_dir."
        )
    check_same_run(output, settings, free)
