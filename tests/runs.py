"""Small preference data and small runs for the tests of the trainer."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from t2i_align import align
from t2i_align.data.media import save_clip
from t2i_align.training import checkpoint
from t2i_align.training.progress import MEASURED


def image(seed: int, side: int = 32) -> Image.Image:
    """An image of blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def jsonl_pairs(folder: Path, count: int = 12) -> Path:
    """A JSONL of pairs with relative paths; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        for side, seed in (("good", 2 * i), ("bad", 2 * i + 1)):
            image(seed).save(folder / f"{i}_{side}.png")
        lines.append({"prompt": f"prompt {i % 5}", "chosen": f"{i}_good.png", "rejected": f"{i}_bad.png"})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def moving_clip(seed: int, frames: int) -> Tensor:
    """Blocks of random colours that wander to the right, 8 bits."""
    still = torch.from_numpy(np.array(image(seed))).permute(2, 0, 1)
    return torch.stack([still.roll(shift, dims=2) for shift in range(frames)])


def jsonl_clips(folder: Path, frames: int, endings: Sequence[str] = (".mp4",), count: int = 6) -> Path:
    """A JSONL of pairs of clips, which have these endings in turn ("" is a folder of frames); returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        names = [f"{i}_{side}{endings[i % len(endings)]}" for side in ("good", "bad")]
        for side, name in enumerate(names):
            save_clip(moving_clip(2 * i + side, frames), folder / name, 16)
        lines.append({"prompt": f"prompt {i % 4}", "chosen": names[0], "rejected": names[1]})
    file = folder / "clips.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def winner_loser_folders(folder: Path, count: int = 6) -> Path:
    """winner/ and loser/ with matching names and a caption beside each winner; returns the folder that holds both."""
    for side, offset in (("winner", 0), ("loser", 1)):
        (folder / side).mkdir(parents=True)
        for i in range(count):
            image(2 * i + offset).save(folder / side / f"{i}.png")
            if side == "winner":
                (folder / side / f"{i}.txt").write_text(f"prompt {i}")
    return folder


def run_values(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A complete run of a few steps as nested values; `changes` use `__` for dots, as in train__steps=3."""
    values: dict[str, Any] = {
        "output_dir": str(output),
        "objective": {"name": "diffusion_dpo", "beta": 100.0},
        "model": {"path": str(model)},
        "data": {"path": str(data)},
        "lora": {"rank": 2, "alpha": 4.0},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 4, "batch_size": 4, "caption_dropout": 0.2},
        "log": {"every": 1, "checkpoint_every": 2},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return values


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without times and memory, in which equal runs differ."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(*arguments: object, processes: int = 1, **how: Any) -> subprocess.Popen[str]:
    """`python` with arguments in processes of its own, under torchrun where there are several; how: see Popen."""
    # Standalone: at a free port, so that tests may run side by side.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *torchrun, *map(str, arguments)], env=environment, **streams, **how)


def finished(process: subprocess.Popen[str]) -> str:
    """Its output, when it has ended; fails with that where it failed."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def command(*arguments: object, cwd: Path, processes: int = 1) -> str:
    """The output of `t2i-align` in a process of its own, from another folder."""
    return finished(start("-m", "t2i_align", *arguments, processes=processes, cwd=cwd))


def launch(
    values: dict[str, Any], folder: Path, *, processes: int = 1, module: Sequence[str] = ("t2i_align.train",),
    **how: Any,
) -> subprocess.Popen[str]:  # fmt: skip
    """`t2i-align train`, or another module with a command, in processes of its own; how: see Popen."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return start("-m", *module, config, processes=processes, **how)


def run_in_two_processes(values: dict[str, Any], folder: Path, **options: Any) -> None:
    """The run under torchrun; fails with its output if it does."""
    finished(launch(values, folder, processes=2, **options))


def lora_of(output: Path) -> dict[str, Tensor]:
    """The tensors of a run's LoRA."""
    return load_file(output / "lora" / "pytorch_lora_weights.safetensors")


def start_processes(values: dict[str, Any], count: int) -> list[BaseProcess]:
    """The run in processes that import everything once between them, which torchrun's each do for themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t2i_align.training.run", "diffusers.pipelines.stable_diffusion", "peft"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, count, port, values)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, count: int, port: int, values: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "MASTER_ADDR": "localhost"}
    if count > 1:
        os.environ |= {name: str(value) for name, value in place.items()}
    align(values, progress=False)
    os._exit(0)  # gloo's threads may abort on the way out


class Killed(BaseException):
    """Ends a run as a kill would: nothing of t2i-align catches it."""


def align_killed(values: dict[str, Any], before: Callable[..., bool], after: Callable[..., bool]) -> None:
    """A run that is killed before or after the first checkpoint for which this holds of its step and state."""
    real = checkpoint.save

    def save(run: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any], *others: Any) -> Path:
        if before(step, state):
            raise Killed
        folder = real(run, step, weights, state, *others)
        if after(step, state):
            raise Killed
        return folder

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", save)
        align(values, progress=False)
