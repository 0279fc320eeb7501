"""`t2i-align plan` against the memory that steps really take, on the bundled bases, and the time of these steps.

    python benchmarks/plan.py                  # by base, what is trained, and precision; writes results/plan_cpu.md
    python benchmarks/plan.py --objectives     # by base and objective, with a LoRA; writes results/objectives_cpu.md
    python benchmarks/plan.py --growth         # by batch and rank; writes results/growth_cpu.md

The measured peak is what PyTorch's CPU allocator reports to its profiler during one logged step of the training loop,
kernels' workspaces included, on top of the tensors that lie in memory before the step. It shares no code with the
plan's own count. Times are of the CPU, of one thread, so that other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipelines import TrainablePipeline
from t2i_align import config as configuration
from t2i_align import objectives
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
TIMED = 3  # steps, after the first, which also makes the optimiser's states
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, bf16": {"train": {"precision": "bf16"}},
    "LoRA, checkpointing": {"train": {"gradient_checkpointing": True}},
    "LoRA, checkpointing, base offloaded": {"train": {"gradient_checkpointing": True, "offload": "base"}},
    "LoRA, InPO": {"objective": "inpo"},
    "LoRA, reward": {"objective": {"name": "reward", "schedule": "draft", "sampling_steps": 4, "last": 2}},
    "full": {"lora": None},
    "full, EMA, MaPO": {"lora": None, "optim": {"ema": 0.9}, "objective": "mapo"},
}


def measured(config: RunConfig, trace_file: Path, timed: int = TIMED) -> tuple[int, float]:
    """Peak bytes of the allocator in the last of a run's first steps, and the median CPU seconds of those before."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before, which may have had another precision
    accelerator = Accelerator(cpu=True, mixed_precision={"bf16": "bf16"}.get(config.train.precision, "no"))
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
    seconds = []
    for _ in range(1 + timed):
        start = time.process_time()
        loop._one_step(batches, report=True, stop=stop)
        seconds.append(time.process_time() - start)
    resting = at_rest(loop, pipeline)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop._one_step(batches, report=True, stop=stop)
    profiler.export_chrome_trace(str(trace_file))
    events = json.loads(trace_file.read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    # The profiler's total goes on from its last run, whose memory may have been freed since.
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    peak = max(event["Total Allocated"] for event in memory) - before
    return resting + peak, statistics.median(seconds[1:] or seconds)


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


def row(base: str, changes: dict[str, Any], batch_size: int) -> list[str]:
    """CPU milliseconds a step, planned and measured MiB, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {"output_dir": f"{folder}/run", "objective": "diffusion_dpo", **changes}
        values["model"] = {"path": f"testbed:{base}"}
        values["data"] = {"path": "testbed:pairs", "limit": 2 * batch_size}
        if base == "wan":
            values["data"] |= {"path": clips(Path(folder))}
        values["train"] = {"batch_size": batch_size, **values.get("train", {})}
        config = configuration.from_mapping(values)
        traced = trace(config, device="cpu")
        planned = traced.peak + traced.host  # which is one memory on a CPU
        peak, seconds = measured(config, Path(folder) / "trace.json")
    return [f"{1000 * seconds:.0f}", *(f"{size / 2**20:.1f}" for size in (planned, peak)), f"{planned / peak:.3f}"]


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Base, name and changed keys of each row."""
    if options.growth:
        for rank in (4, 16, 64):
            yield options.bases[0], f"rank {rank}", {"lora": {"rank": rank}}
        for size in (1, 2, 4, 8):
            yield options.bases[0], f"{size} pairs, rank 16", {"train": {"batch_size": size}}
        return
    if not options.objectives:
        yield from ((base, kind, KINDS[kind]) for base, kind in product(options.bases, options.kinds))
        return
    for base, name in product(options.bases, objectives.CLASSES):
        needs = objectives.get(name).needs
        if not needs.columns and not needs.scorer:  # what the bundled pairs have
            yield base, name, {"objective": name}
    yield from ((base, "reward, draft, 4 steps", KINDS["LoRA, reward"]) for base in options.bases)


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
    parser.add_argument("--objectives", action="store_true", help="all that the bundled pairs serve, with a LoRA")
    parser.add_argument("--growth", action="store_true", help="with the LoRA's rank and the batch, on one base")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    head = [
        "base",
        "objective" if options.objectives else "what",
        "CPU ms per step",
        "planned, MiB",
        "measured, MiB",
        "planned / measured",
    ]
    table = [head, ["---"] * len(head)]
    for base, name, changes in cases(options):
        table.append([base, name, *row(base, changes, options.batch_size)])
        print(" | ".join(table[-1]), flush=True)
    text = "\n".join([
        "# Planned and measured memory of a step", "",
        f"`{' '.join(['python', 'benchmarks/plan.py', *sys.argv[1:]])}`", "",
        f"{platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__}. Diffusion-DPO "
        f"where no other is named, {options.batch_size} pairs per step, one thread; the median of {TIMED} steps, and "
        "the peak of a logged step.", "",
        *("| " + " | ".join(row) + " |" for row in table), "",
    ])  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    name = "objectives" if options.objectives else "growth" if options.growth else "plan"
    (RESULTS / f"{name}_cpu.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
