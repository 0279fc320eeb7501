"""Time and memory of every objective's training step relative to Diffusion-DPO's, interleaved in one process.

    python benchmarks/claims_cost.py --work runs/claims      # needs the data of claims.py and an idle machine

Times the forward and backward pass of one micro-batch, including the reference's predictions; the optimiser step is the
same for all. Memory is what autograd saves for the backward pass. Writes `claims_cost.json` to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from claims import BASE, CLAIMS, METHODS, RESULTS, Budget, Run, configuration
from torch import Tensor

from t2i_align import config as configs
from t2i_align.training.reference import build_reference
from t2i_align.training.run import load_data, load_model, prepare_denoiser
from t2i_align.training.trainer import Alignment
from t2i_align.utils.files import write_json

Step = Callable[[], Tensor]


def build(method: str, condition: str, budget: Budget, work: Path) -> Step:
    """A function that runs the forward and backward pass of one micro-batch as the trainer does."""
    run = Run(condition, method, METHODS[method].knob[1], 0, "test")
    config = configs.from_mapping(configuration(run, budget, work))
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipeline = load_model(config, accelerator.device)
    source = load_data(config, accelerator, pipeline, progress=False)
    prepare_denoiser(config, pipeline, source, accelerator)
    config = dataclasses.replace(config, objective=config.objective.fit_to_data(source.stats))
    reference = build_reference(config.train, pipeline, needed=config.objective.needs.reference)
    task = Alignment(config, accelerator, reference, source)
    batch = next(task.batches(0))

    def step() -> Tensor:
        loss, _ = task.losses(pipeline.denoiser, batch)
        loss.mean().backward()
        pipeline.denoiser.zero_grad(set_to_none=True)
        return loss

    return step


def kept_bytes(step: Step) -> int:
    """Bytes that autograd saves for the backward pass, each storage counted once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, default=Path("runs/claims"))
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for claims_cost.json")
    args = p.parse_args()
    budget = Budget(1, args.batch_size, 1, 1)
    condition = {claim.method: claim.condition for claim in reversed(CLAIMS)}
    steps = {method: build(method, condition[method], budget, args.work) for method in condition}
    memory = {method: kept_bytes(step) for method, step in steps.items()}  # also warms up
    times: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(args.rounds):
        for method, step in steps.items():
            started = time.perf_counter()
            step()
            times[method].append(time.perf_counter() - started)
    base = "diffusion_dpo"
    rows = {}
    for method in steps:
        ratios = [own / dpo for own, dpo in zip(times[method], times[base], strict=True)]
        rows[method] = {"time": round(statistics.median(ratios), 2), "memory": round(memory[method] / memory[base], 2)}
        print(f"{method:<18} time {rows[method]['time']:.2f}  memory {rows[method]['memory']:.2f}", flush=True)
    settings = {"base": BASE, "batch_size": args.batch_size, "rounds": args.rounds, "threads": torch.get_num_threads(),
                "device": "cpu" if not torch.accelerator.is_available() else "accelerator"}  # fmt: skip
    write_json(args.out / "claims_cost.json", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
