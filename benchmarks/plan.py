"""`t2i-align plan` against the memory that steps really take, on the bundled bases.

    python benchmarks/plan.py     # writes benchmarks/results/plan_cpu.md

The measured peak is what PyTorch's CPU allocator reports to its profiler during one logged step of the training loop,
kernels' workspaces included, on top of the tensors that lie in memory before the step. It shares no code with the
plan's own count.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipelines import TrainablePipeline
from t2i_align import config as configuration
from t2i_align.config import RunConfig
from t2i_align.planning.inputs import Brightness
from t2i_align.planning.trace import trace
from t2i_align.training.loop import Loop
from t2i_align.training.reference import build_reference
from t2i_align.training.rewards import Rewarder
from t2i_align.training.run import load_data, load_model, prepare_denoiser
from t2i_align.training.trainer import Alignment
from t2i_align.utils.logging import silence_libraries

RESULTS = Path(__file__).parent / "results"
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, bf16": {"train": {"precision": "bf16"}},
    "LoRA, checkpointing": {"train": {"gradient_checkpointing": True}},
    "LoRA, checkpointing, base offloaded": {"train": {"gradient_checkpointing": True, "offload": "base"}},
    "LoRA, SmPO": {"objective": "smpo"},
    "LoRA, reward": {"objective": {"name": "reward", "schedule": "draft", "sampling_steps": 4, "last": 2}},
    "full": {"lora": None},
    "full, EMA, MaPO": {"lora": None, "optim": {"ema": 0.9}, "objective": "mapo"},
}


def measured(config: RunConfig, trace_file: Path) -> int:
    """Peak bytes of the allocator in the third step of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before, which may have had another precision
    accelerator = Accelerator(mixed_precision={"bf16": "bf16"}.get(config.train.precision, "no"))
    pipeline = load_model(config, accelerator.device)
    source = load_data(config, accelerator, pipeline, progress=False)
    prepare_denoiser(config, pipeline, source, accelerator)
    needs = config.objective.needs
    rewarder = Rewarder(pipeline, Brightness()) if needs.scorer else None  # type: ignore[arg-type]
    if not rewarder:
        pipeline.drop_encoders()
    reference = build_reference(config.train, pipeline, needed=needs.reference)
    task = Alignment(config, accelerator, reference, source, rewarder=rewarder)
    loop = Loop(task, accelerator, config, progress=False)
    batches, stop = task.batches(0), threading.Event()
    for _ in range(2):
        loop._one_step(batches, report=True, stop=stop)
    resting = at_rest(loop, pipeline)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop._one_step(batches, report=True, stop=stop)
    profiler.export_chrome_trace(str(trace_file))
    events = json.loads(trace_file.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return resting + max(totals)


def at_rest(loop: Loop, pipeline: TrainablePipeline) -> int:
    """Bytes of the weights, reference, average and optimiser's states, which lie in memory between steps."""
    states = [value for state in loop.optimizer.state.values() for value in state.values()]
    tensors: list[Any] = [value for value in states if isinstance(value, torch.Tensor)]
    for variant in loop.weights.variants.values():
        tensors += [*variant.network.parameters(), *variant.network.buffers(), *variant.tensors.values()]
    for name in pipeline.modules().keys() & pipeline.encoder_names:  # which a reward's run keeps
        tensors += [*pipeline.modules()[name].parameters(), *pipeline.modules()[name].buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def rows(bases: list[str], kinds: list[str], batch_size: int) -> Iterator[list[str]]:
    """The rows of the table."""
    for base, kind in product(bases, kinds):
        with tempfile.TemporaryDirectory() as folder:
            values: dict[str, Any] = {"output_dir": f"{folder}/run", "objective": "diffusion_dpo", **KINDS[kind]}
            values["model"] = {"path": f"testbed:{base}"}
            values["data"] = {"path": "testbed:pairs", "limit": 2 * batch_size}
            if base == "wan":
                values["data"] |= {"path": clips(Path(folder))}
            values["train"] = {"batch_size": batch_size, **values.get("train", {})}
            config = configuration.from_mapping(values)
            traced = trace(config, device="cpu")
            planned = traced.peak + traced.host  # which is one memory on a CPU
            peak = measured(config, Path(folder) / "trace.json")
        yield [base, kind, *(f"{size / 2**20:.1f}" for size in (planned, peak)), f"{planned / peak:.3f}"]


def clips(folder: Path) -> str:
    """A few pairs of clips of the bundled base's size; returns their table."""
    from t2i_align.data.media import save_clip

    generator = torch.Generator().manual_seed(0)
    lines = []
    for i in range(16):
        names = [f"{i}_{side}.mp4" for side in ("good", "bad")]
        for name in names:
            save_clip(torch.randint(0, 256, (9, 3, 64, 64), generator=generator, dtype=torch.uint8), folder / name, 16)
        lines.append(json.dumps({"prompt": f"prompt {i}", "chosen": names[0], "rejected": names[1]}))
    (folder / "clips.jsonl").write_text("\n".join(lines))
    return str(folder / "clips.jsonl")


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["sd", "sdxl", "sd3", "wan"], help="bundled bases")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="what is trained and how")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    options = parser.parse_args()
    silence_libraries()
    head = ["base", "trained", "planned, MiB", "measured, MiB", "planned / measured"]
    table = [head, ["---"] * len(head)]
    for row in rows(options.bases, options.kinds, options.batch_size):
        table.append(row)
        print(" | ".join(row), flush=True)
    text = "\n".join([
        "# Planned and measured memory of a step", "",
        f"`{' '.join(['python', 'benchmarks/plan.py', *sys.argv[1:]])}`", "",
        f"{platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__}. Diffusion-DPO "
        f"where no other is named, {options.batch_size} pairs per step, peak of a logged step from the third on.", "",
        *("| " + " | ".join(row) + " |" for row in table), "",
    ])  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan_cpu.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
