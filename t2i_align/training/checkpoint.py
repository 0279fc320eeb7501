"""Crash-safe checkpoints: written under a temporary name, then renamed, and never written again.

checkpoints/step_000500/weights.safetensors    the trained parameters, and other weights that change (`ema.NAME`)
                        state.pt               optimiser, schedule, scaler, logged sums: plain tensors and numbers
                        sha256.json            of all other files: a damaged or exchanged one is refused
                        shards/                where they are sharded, in place of weights and the optimiser's tensors
                        lora/ or soft_tokens/  the adapter as it was then, for use
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from t2i_align.errors import UserError
from t2i_align.training import sharding
from t2i_align.utils.arrow import sha256
from t2i_align.utils.files import WRITING, atomic_folder, read_json, whole_lines, write_json, write_text

FOLDER, KEPT = "checkpoints", "weights"  # KEPT: what `log.keep_weights` asks for, a folder a step, without a state
NAME = re.compile(r"step_\d{6,}")
WEIGHTS, STATE, SUMS, SHARDS = "weights.safetensors", "state.pt", "sha256.json", "shards"
NOT_WRITTEN = "the checkpoint could not be written; earlier ones are untouched"
LAYOUT = 6  # raised when the state gets other entries


@contextmanager
def writing(folder: Path, what: str = "could not be written; resume=true writes it anew") -> Iterator[Path]:
    """`atomic_folder`, with one message for all the ways in which libraries say that the disk is full."""
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: {what} ({error})") from error


def save(
    run: Path,
    step: int,
    weights: dict[str, Tensor] | Path,
    state: dict[str, Any],
    keep: int,
    export: Callable[[Path], object] | None = None,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`; returns its folder.

    weights: or the folder in which `save_shards` has written them. export: writes more into it.
    """
    folder = run / FOLDER / name_of(step)
    with writing(folder, NOT_WRITTEN) as temporary:
        if isinstance(weights, Path):
            weights.rename(temporary / SHARDS)
        else:
            save_file({name: part.detach().cpu().contiguous() for name, part in weights.items()}, temporary / WEIGHTS)
        torch.save({"layout": LAYOUT, "step": step, **state}, temporary / STATE)
        if export:
            export(temporary)
        files = sorted(file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file())
        write_json(temporary / SUMS, {name: sha256(temporary / name) for name in files})
    for old in all_steps(run)[:-keep]:
        remove(old)
    return folder


def save_shards(run: Path, accelerator: Accelerator, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> Path:
    """Write what is sharded, each process its part, and take the tensors out of the optimiser's state.

    All processes call it; returns the folder, for `save`.
    """
    folder = run / FOLDER / f"{WRITING}{SHARDS}"
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        sharding.write(folder, weights, optimizer["state"])
    except CheckpointException as error:
        raise UserError(f"{folder}: {NOT_WRITTEN} ({error})") from error
    optimizer["state"] = {}
    return folder


def name_of(step: int) -> str:
    """The name of the folders of a step."""
    return f"step_{step:06d}"


def remove(folder: Path) -> None:
    """Delete a checkpoint; under another name, so that one that is half deleted counts as none."""
    gone = folder.with_name(f"{WRITING}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(folder.rename(gone))


def all_steps(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    complete = [path for path in (run / FOLDER).glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(complete, key=_step)


def run_of(path: Path) -> Path | None:
    """The folder of the run that `path` lies in: it is a checkpoint's or a kept step's, or what is exported there."""
    step = next((folder for folder in (path, path.parent) if NAME.fullmatch(folder.name)), None)
    return step.parent.parent if step and step.parent.name in (FOLDER, KEPT) else None


def result(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint that its run would end with: the average where it has one, else the policy's."""
    weights = sharding.read(folder / SHARDS)[0] if (folder / SHARDS).is_dir() else load_file(folder / WEIGHTS)
    average = {name.removeprefix("ema."): tensor for name, tensor in weights.items() if name.startswith("ema.")}
    return average or {name: tensor for name, tensor in weights.items() if not name.startswith("reference.")}


def load(
    folder: Path, own: Mapping[str, Tensor] | None = None, trained: Sequence[Tensor] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and state of one checkpoint. own, trained: see `sharding.read`.

    Raises:
        UserError: it is damaged, or was written by another version.
    """
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if current := state["layout"] == LAYOUT:
            _check_unchanged(folder, state["step"])
        if (folder / SHARDS).is_dir():
            weights, state["optimizer"]["state"] = sharding.read(folder / SHARDS, own or {}, trained)
        else:
            weights = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors, pickle and the file system each raise their own
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{folder}: damaged checkpoint ({reason}). Remove this folder to resume from the one before it."
        ) from error
    if not current:
        raise UserError(f"{folder}: written by another version of t2i-align; resume it with that version")
    return weights, state


def check_continues(
    folder: Path, state: dict[str, Any], same: Mapping[str, str], groups_per_step: int, steps: int
) -> None:
    """Raise UserError where a run cannot continue a checkpoint.

    Args:
        same: fingerprints of what must be as it was, such as the data. steps: the run's last step.
    """
    run, name = folder.parent.parent, folder.name
    for what, fingerprint in same.items():
        if state["same"][what] != fingerprint:
            raise UserError(
                f"{run}: the {what} has changed since {name} was saved; "
                f"resume needs the same {what}, or choose another output_dir"
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
    """Drop JSON lines after `step`, so that a resumed run's file equals an uninterrupted one's; returns the rest.

    Lines of rollbacks are kept: the step that they name is where the run went back to.
    """
    records = whole_lines(file)
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("step"), int):
            raise UserError(f"{file}, line {number}: 'step' must be a whole number, found {record.get('step')!r}")
    kept = [record for record in records if record["step"] <= step or "rollback" in record]
    if file.exists():
        write_text(file, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _check_unchanged(folder: Path, step: int) -> None:
    if step != _step(folder):
        raise ValueError(f"it is of step {step}")
    written = read_json(folder / SUMS)
    shards = [f"{SHARDS}/{file.name}" for file in (folder / SHARDS).glob("*")]
    names = dict.fromkeys([*(shards or [WEIGHTS]), STATE, *written])
    if changed := [name for name in names if written.get(name) != sha256(folder / name)]:
        raise ValueError(f"{' and '.join(changed)} changed after being written")
