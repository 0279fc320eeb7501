"""DDP and FSDP2 with one to four processes: seconds a step, memory of a process, and the losses.

    python benchmarks/processes.py     # writes benchmarks/results/processes_<device>.md

All weights of one model are trained by Diffusion-DPO on the bundled pairs, the same groups in every row. On CPUs (gloo)
the model is Stable Diffusion's classes with a UNet of random weights, large enough for memory to show how it is shared;
processes then divide the machine's cores, so that time says what sharing costs, not how fast more of them are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel

from t2i_align.inference.models import load_pipeline
from t2i_align.utils.logging import silence_libraries

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def make_model(folder: Path, widths: tuple[int, ...]) -> Path:
    """The bundled Stable Diffusion around a wider UNet of random weights."""
    pipe = load_pipeline("testbed:sd").pipe
    torch.manual_seed(0)
    levels = len(widths)
    pipe.register_modules(
        unet=UNet2DConditionModel(
            sample_size=16, block_out_channels=widths, layers_per_block=2, attention_head_dim=8,
            cross_attention_dim=pipe.unet.config.cross_attention_dim,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
            up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        )
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def run(config: dict[str, Any], processes: int, folder: Path) -> list[dict[str, float]]:
    """The lines of metrics of a run in so many processes, one thread each on a CPU."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "t2i_align.train", str(file)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(launch)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model instead of the one of random weights")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help="of its UNet's levels")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--groups", type=int, default=8, help="pairs per step, divided among the processes")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    silence_libraries()
    rows, first = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or str(make_model(Path(temporary) / "model", tuple(options.widths)))
        for name, shard in (("DDP", False), ("FSDP2", True)):
            for processes in [count for count in options.processes if count > 1 or not shard]:
                folder = Path(temporary) / f"{name}-{processes}"
                folder.mkdir()
                lines = run({
                    "output_dir": str(folder / "run"), "model": {"path": model},
                    "data": {"path": "testbed:pairs", "limit": 64, "cache_dir": f"{temporary}/cache"},
                    "objective": "diffusion_dpo", "lora": None, "optim": {"lr": 1e-5},
                    "train": {
                        "steps": options.steps, "batch_size": options.groups // processes,
                        "shard": shard,
                    },
                    "log": {"every": 1, "checkpoint_every": options.steps},
                }, processes, folder)  # fmt: skip
                seconds = statistics.median(line["seconds_per_step"] for line in lines[1:] if "loss" in line)
                memory = max(line["memory_gib"] for line in lines if "memory_gib" in line)
                losses = [line["loss"] for line in lines if "loss" in line]
                first = first or seconds
                label = name if processes > 1 else "one process"
                rows.append([label, str(processes), f"{seconds:.2f}", f"{seconds / first:.2f}", f"{memory:.2f}",
                             f"{losses[0]:.5f}", f"{losses[-1]:.5f}"])  # fmt: skip
                print(" | ".join(rows[-1]), flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = ["", "processes", "s a step", "against the first row", "GiB a process", "first loss", "last loss"]
    table = [head, ["---"] * len(head), *rows]
    text = "\n".join([
        "# Processes that train one model", "",
        f"`{' '.join(['python', 'benchmarks/processes.py', *sys.argv[1:]])}`", "",
        f"{os.cpu_count()} {platform.machine()} cores ({device}), Python {platform.python_version()}, torch "
        f"{torch.__version__}; {options.groups} pairs a step, all weights. Memory is a process's whole, imports "
        "included.", "",
        *("| " + " | ".join(row) + " |" for row in table), "",
    ])  # fmt: skip
    (RESULTS / f"processes_{device}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
