"""The output folder of a run: one run per folder, continued only when asked to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from t2i_align.errors import UserError
from t2i_align.training import checkpoint
from t2i_align.utils.files import WRITING, differences, write_text

RUN_FILE = "run.yaml"


def check_output(
    output: Path, settings: Mapping[str, Any], *, resume: bool, free: Collection[str], extra: tuple[str, ...] = ()
) -> None:
    """Refuse a folder that holds something else, or another run; or this one, unless `resume`. Call it under the lock.

    Args:
        settings: the run's, as in its run.yaml. free: dotted keys in which a continuation may differ.
        extra: beginnings of files' names that a run may have left before its run.yaml.
    """
    if not output.is_dir() or all(entry.name.startswith((WRITING, *extra)) for entry in output.iterdir()):
        return
    if not (output / RUN_FILE).is_file():
        raise UserError(f"output_dir {output}: the folder is not empty and holds no run; choose another")
    if not resume:
        steps = checkpoint.all_steps(output)
        state = f"its newest checkpoint is {steps[-1].name}" if steps else "it has no checkpoint yet"
        raise UserError(
            f"output_dir {output}: this folder holds a run already ({state}). "
            "Add resume=true to continue it, or choose another output_dir."
        )
    check_same_run(output, settings, free)


def check_same_run(output: Path, settings: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise UserError where the folder holds a run with other settings, naming each key."""
    if not (file := output / RUN_FILE).is_file():
        return
    if keys := differences(yaml.safe_load(file.read_text(encoding="utf-8")), settings, {"output_dir", *free}):
        raise UserError(f"output_dir {output}: this folder holds another run: {'; '.join(keys)}")


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Write run.yaml, when all that can be wrong has been checked: from here on the folder holds this run."""
    write_text(output / RUN_FILE, yaml.safe_dump(dict(settings), sort_keys=False))
