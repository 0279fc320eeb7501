"""Reward fine-tuning: what each schedule keeps for its backward pass, and its time, against the sampler's steps.

    python benchmarks/reward.py          # the bundled model; writes benchmarks/results/reward_<device>.md
    python benchmarks/reward.py --steps 5 10 20 --batch-size 4

Seconds are of the CPU, or of the clock with CUDA. The memory is that of the tensors that are alive between the forward
and the backward pass and were not before it, each storage once. `no checkpoints` is DRaFT
through all steps without checkpointing.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from t2i_align.config import ModelConfig
from t2i_align.diffusion import sampling
from t2i_align.diffusion.noising import repeated
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.inference.models import load_pipeline

RESULTS = Path(__file__).parent / "results"
PROMPT = "a large red circle to the left of a small blue square on a white background"
CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "longalign, every 5": ("longalign", {"every": 5}),
    "refl": ("refl", {"last": 5}),
    "draft, K = 1": ("draft", {"last": 1}),
    "draft, K = 3": ("draft", {"last": 3}),
    "draft_lv, n = 2": ("draft_lv", {"last": 2}),
    "draft, all": ("draft", {"last": 10**6}),
    "no checkpoints": ("draft", {"last": 10**6}),
}


def measure(pipeline: Any, name: Any, options: dict[str, int], steps: int, batch: int) -> tuple[float, float]:
    """MB kept for the backward pass, and CPU seconds of forward and backward."""
    rng = SampleRNG(0, [f"0/{i}" for i in range(batch)], pipeline.process, device=pipeline.device)
    conditioning = pipeline.encode_prompts([PROMPT] * batch)
    conditioning, empty = repeated(conditioning, pipeline.encode_prompts([""]), batch)
    side = pipeline.default_size[0] // pipeline.vae_factor
    noise = rng.normal("noise", (pipeline.denoiser.config.in_channels, side, side))
    plan = sampling.schedule(name, steps, rng, **options)
    sampler = sampling.Sampler(process=pipeline.process, steps=steps, guidance=2.0)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    before = storages(alive())
    clock = time.perf_counter if pipeline.device.type == "cuda" else time.process_time  # the CPU may be shared
    start = clock()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        clean = sampler.sample(pipeline.predict, noise, conditioning, empty, plan, rng)
    forward = clock() - start
    kept = {**saved, **storages(alive())}  # what autograd saves, and what checkpoints hold
    start = clock()
    clean.square().mean().backward()
    seconds = forward + clock() - start
    pipeline.denoiser.zero_grad(set_to_none=True)
    return sum(size for place, size in kept.items() if place not in before) / 1e6, seconds


def alive() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by the place of each storage."""
    return {(storage := tensor.untyped_storage()).data_ptr(): storage.nbytes() for tensor in tensors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:sd")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pipeline = load_pipeline(ModelConfig(path=arguments.model))
    pipeline.add_lora(rank=16, alpha=16, dropout=0.0, targets="attention")
    lines = [f"| schedule | {' | '.join(f'{steps} steps' for steps in arguments.steps)} |"]
    lines += ["|---" * (1 + len(arguments.steps)) + "|"]
    for case, (name, options) in CASES.items():
        cells = []
        for steps in arguments.steps:
            whole = patch.object(sampling, "checkpoint", lambda run, *inputs, use_reentrant: run(*inputs))
            if case == "no checkpoints":
                whole.start()
            rounds = [measure(pipeline, name, options, steps, arguments.batch_size) for _ in range(arguments.rounds)]
            if case == "no checkpoints":
                whole.stop()
            cells.append(f"{rounds[0][0]:.2f} MB, {statistics.median(row[1] for row in rounds):.2f} s")
        lines.append(f"| {case} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    command = f"python benchmarks/reward.py --steps {' '.join(map(str, arguments.steps))} --rounds {arguments.rounds}"
    head = (
        f"`{command}`: {arguments.model}, batch {arguments.batch_size}, guidance 2, LoRA 16, fp32, {platform.machine()}"
    )
    head += f", {torch.get_num_threads()} threads, torch {torch.__version__}; median of {arguments.rounds} rounds."
    file = RESULTS / f"reward_{pipeline.device.type}.md"
    file.write_text(f"# Reward fine-tuning\n\n{head} \n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
