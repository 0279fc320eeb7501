"""Time and memory of a training step of every objective, relative to Diffusion-DPO's: they take turns in one run.

    python benchmarks/claims_cost.py --work runs/claims      # after claims.py has made its data; on an idle machine

Timed are a forward and a backward pass of one micro-batch, with everything that the objective asks of the reference;
the optimiser's step is the same for all. Memory is what autograd keeps for the backward pass. Writes
`benchmarks/results/claims_cost.json`.
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
from claims import BASE, CLAIMS, METHODS, ROOT, Budget, Run, configuration, write_json
from torch import Tensor

from t2i_align import config as plain
from t2i_align.training.reference import build_reference
from t2i_align.training.run import load_data, load_model, prepare_denoiser
from t2i_align.training.trainer import Alignment

Step = Callable[[], Tensor]


def build(method: str, condition: str, budget: Budget, work: Path) -> Step:
    """One micro-batch of the method, forward and backward, as the trainer would do it."""
    run = Run(condition, method, METHODS[method].knob[1], 0, "test")
    config = plain.from_mapping(configuration(run, budget, work))
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipeline = load_model(config, accelerator.device)
    prepare_denoiser(config, pipeline)
    source = load_data(config, accelerator, pipeline, progress=False)
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
    """Bytes that autograd keeps for the backward pass, each storage once."""
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
    args = p.parse_args()
    budget = Budget(1, args.batch_size, 1, 1)
    condition = {claim.method: claim.condition for claim in reversed(CLAIMS)}
    steps = {method: build(method, condition[method], budget, args.work) for method in condition}
    memory = {method: kept_bytes(step) for method, step in steps.items()}  # and a first, slow call
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
    write_json(ROOT / "benchmarks" / "results" / "claims_cost.json", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
