"""Checkpoints that a kill at any instant cannot spoil: written under a temporary name, then renamed.

checkpoints/step_000500/weights.safetensors    the trained parameters (and their average)
                        state.pt               optimiser, schedule, scaler, logged sums: plain tensors and numbers
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_align.errors import UserError

FOLDER = "checkpoints"
LAYOUT = 3  # raised when the state gets other entries


def save(run: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`; returns its folder."""
    folder = run / FOLDER
    final, temporary = folder / f"step_{step:06d}", folder / f".writing_{step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(plain, temporary / "weights.safetensors")
        torch.save({"layout": LAYOUT, "step": step, **state}, temporary / "state.pt")
        for file in temporary.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        message = f"{final}: the checkpoint could not be written ({error}); earlier ones are untouched"
        raise UserError(message) from error
    for old in all_steps(run)[:-keep]:
        shutil.rmtree(old)
    return final


def all_steps(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in (run / FOLDER).glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and state of one checkpoint; a damaged one, or one of another version, is a clear error."""
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


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Add one JSON line."""
    with open(file, "a") as stream:
        stream.write(json.dumps(record) + "\n")


def truncate_lines(file: Path, step: int) -> list[dict[str, Any]]:
    """Drop JSON lines written after `step`, so that a resumed run's file equals an uninterrupted one's.

    Returns what the lines that stay hold.
    """
    if not file.exists():
        return []
    kept = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line of a killed run
        if record["step"] <= step:
            kept.append((line, record))
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line, _ in kept))
    temporary.replace(file)
    return [record for _, record in kept]
