"""Crash-safe checkpoints: written under a temporary name, then renamed.

checkpoints/step_000500/weights.safetensors    the trained parameters, and other weights that change (`ema.NAME`)
                        state.pt               optimiser, schedule, scaler, logged sums: plain tensors and numbers
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_align.errors import UserError
from t2i_align.utils.files import atomic_folder, whole_lines, write_text

FOLDER = "checkpoints"
LAYOUT = 3  # raised when the state gets other entries


def save(run: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`; returns its folder."""
    folder = run / FOLDER / f"step_{step:06d}"
    try:
        with atomic_folder(folder) as temporary:
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(plain, temporary / "weights.safetensors")
            torch.save({"layout": LAYOUT, "step": step, **state}, temporary / "state.pt")
    except OSError as error:
        message = f"{folder}: the checkpoint could not be written ({error}); earlier ones are untouched"
        raise UserError(message) from error
    for old in all_steps(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def all_steps(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    complete = [path for path in (run / FOLDER).glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and state of one checkpoint.

    Raises:
        UserError: it is damaged, or was written by another version.
    """
    try:
        weights = load_file(folder / "weights.safetensors")
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and the file system each raise their own
        raise UserError(
            f"{folder}: damaged checkpoint ({error}). Remove this folder to resume from the one before it."
        ) from error
    if state.get("layout") != LAYOUT:
        raise UserError(f"{folder}: written by another version of t2i-align; resume it with that version")
    return weights, state


def check_continues(folder: Path, state: dict[str, Any], data: str, groups_per_step: int, steps: int) -> None:
    """Raise UserError where a run with this data, groups per step and number of steps cannot continue a checkpoint."""
    run, name = folder.parent.parent, folder.name
    if state["data"] != data:
        raise UserError(
            f"{run}: the data has changed since {name} was saved; "
            "resume needs the same data, or choose another output_dir"
        )
    if state["groups_per_step"] != groups_per_step:
        raise UserError(
            f"{run}: a step of this run takes {state['groups_per_step']} groups; train.batch_size x train.accumulate x "
            f"processes is {groups_per_step} now. Choose them so that the product is the same, and every sample is "
            "seen exactly once."
        )
    if state["step"] > steps:
        raise UserError(f"{run}: {name} is beyond train.steps={steps}; remove the later checkpoints to go back")


def truncate_lines(file: Path, step: int) -> list[dict[str, Any]]:
    """Drop JSON lines after `step`, so that a resumed run's file equals an uninterrupted one's; returns the rest."""
    records = [record for record in whole_lines(file) if record["step"] <= step]
    if file.exists():
        write_text(file, "".join(json.dumps(record) + "\n" for record in records))
    return records
