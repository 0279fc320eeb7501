"""The training step against plain loops in the manner of others: the same mathematics, in one process.

    python benchmarks/step.py     # the bundled model and pairs; writes benchmarks/results/step_<device>.md
    python benchmarks/step.py --full     # all weights trained; writes step_full_<device>.md
    python benchmarks/step.py --model PATH_OR_HUB_ID --data my_pairs.jsonl --batch-size 4

The loops are interleaved, a few steps each, so that other load on the machine affects all of them; on a CPU its time is
counted, not the clock's:

- ours: `Loop.run` as in `t2i-align train`, with loader, per-sample random numbers, checks, progress bar and log;
- bare: a plain loop over the same latents and embeddings in memory;
- with encoders: the same loop, encoding images and prompts in each step. So does diffusers' script for Diffusion-DPO,
  with a LoRA switched off for the reference, and the paper's own code, which trains all weights beside a second
  network as the reference (`--full`);
- from the second run on (without `--full`): our loop again, with the reference's errors from the first
  (`train.store_reference`), and a pipeline, weights and optimiser of its own.

Before timing, ours and bare must agree on the loss of one batch with the same noise.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

import pipelines
from t2i_align import config as configuration
from t2i_align.conditioning.adapter import TRAINED
from t2i_align.config import RunConfig
from t2i_align.data.batch import Batch
from t2i_align.data.loader import PreferenceDataset
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.inference.models import resolve_model
from t2i_align.training.loop import Loop
from t2i_align.training.output import write_settings
from t2i_align.training.reference import build_reference
from t2i_align.training.run import load_data, load_model, prepare_denoiser
from t2i_align.training.stored_errors import StoredErrors, open_errors
from t2i_align.training.trainer import Alignment
from t2i_align.training.weights import adapters_off

BATCHES = 8  # kept in memory for the bare loops
RESULTS = Path(__file__).parent / "results"
SECOND = "ours, from the second run on"


class Bare:
    """Diffusion-DPO written out without abstractions."""

    def __init__(self, config: RunConfig, batches: list[Batch], device: torch.device) -> None:
        self.pipeline = pipelines.load(resolve_model(config.model.path)).to(device)
        torch.manual_seed(config.train.seed)  # as `prepare_denoiser`
        TRAINED[config.trains].install(self.pipeline, config, set(), None)
        self.unet, self.batches, self.count = self.pipeline.denoiser, batches, 0
        self.beta, self.v_prediction = config.objective.beta, self.pipeline.process.prediction_type == "v_prediction"
        self.abar = self.pipeline.pipe.scheduler.alphas_cumprod.to(device)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.other = None if config.lora else copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.optim.lr, weight_decay=1e-2, fused=True)

    def loss(self, latents: Tensor, embeds: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """latents [B, 2, C, H, W], best first; embeds [B, L, D]; noise [B, C, H, W] and t [B] shared by a pair."""
        x, embeds = latents.flatten(0, 1), embeds.repeat_interleave(2, 0)
        noise, t = noise.repeat_interleave(2, 0), t.repeat_interleave(2, 0)
        abar = self.abar[t].float().view(-1, 1, 1, 1)
        noisy = abar.sqrt() * x + (1 - abar).sqrt() * noise
        target = abar.sqrt() * noise - (1 - abar).sqrt() * x if self.v_prediction else noise
        with torch.no_grad(), nullcontext() if self.other else adapters_off(self.unet).using():
            reference = (self.other or self.unet)(noisy, t, embeds).sample
        prediction = self.unet(noisy, t, embeds).sample
        error = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1).view(-1, 2)
        reference_error = F.mse_loss(reference.float(), target, reduction="none").flatten(1).mean(1).view(-1, 2)
        s = error - reference_error
        return -F.logsigmoid(-0.5 * self.beta * (s[:, 0] - s[:, 1])).mean()

    def step(self, latents: Tensor, embeds: Tensor) -> None:
        noise = torch.randn_like(latents[:, 0])
        t = torch.randint(0, len(self.abar), (len(latents),), device=latents.device)
        self.loss(latents, embeds, noise, t).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def cached(self) -> None:
        """One step from latents and embeddings in memory."""
        batch = self._next()
        self.step(batch.latents, batch.conditioning["prompt_embeds"])

    def encoding(self) -> None:
        """One step that encodes its images and prompts first; the images are in memory, nothing is decoded."""
        shape, device = self._next().latents.shape, self.abar.device
        pixels = torch.rand(2 * shape[0], 3, *self.pipeline.default_size, device=device)
        latents = self.pipeline.encode_pixels(pixels).view(shape)
        prompts = [f"prompt {i}" for i in range(shape[0])]
        self.step(latents, self.pipeline.encode_prompts(prompts)["prompt_embeds"])

    def _next(self) -> Batch:
        self.count += 1
        return self.batches[self.count % len(self.batches)]


class SecondRun:
    """Our loop over the same steps as the first run, whose stored errors it reads before each of its turns."""

    def __init__(self, config: RunConfig, first: StoredErrors, accelerator: Accelerator) -> None:
        pipeline = load_model(config, accelerator.device)
        source = load_data(config, accelerator, pipeline, progress=False)
        prepare_denoiser(config, pipeline, source, accelerator)
        pipeline.drop_encoders()
        self.first, self.errors = first, StoredErrors(first.folder.parent, first.fingerprint)
        reference = build_reference(config.train, pipeline)
        task = Alignment(config, accelerator, reference, source, errors=self.errors)
        self.loop, self.stop = Loop(task, accelerator, config, progress=False), threading.Event()
        self.loop.network.train()
        self.batches = task.batches(0)

    def read(self) -> None:
        """Take what the first run has computed since the last time."""
        self.first.write()
        self.errors.load()

    def step(self) -> None:
        """One step of the loop, as it is where nothing is logged."""
        self.loop._one_step(self.batches, report=False, stop=self.stop)


@dataclass
class TakingTurns:
    """A dataset that times `chunk` steps of the trainer, then of each rival, and records the seconds per step.

    It sits where the trainer asks for data, so that the trainer's own loop is timed unchanged.
    """

    source: PreferenceDataset
    rivals: dict[str, Callable[[], None]]
    rounds: int
    chunk: int
    device: torch.device
    before: Callable[[], None] | None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def loader(self, **options: Any) -> Iterator[Any]:
        items = self.source.loader(**options)
        for _ in range(self.rounds):
            yield next(items)  # not timed: caches are cold after another loop
            started = self._now()
            for _ in range(self.chunk):
                yield next(items)
            self._record("ours", started)
            if self.before:
                self.before()
            for name, step in self.rivals.items():
                step()
                started = self._now()
                for _ in range(self.chunk):
                    step()
                self._record(name, started)
        yield next(items)  # for the step after the last round, not timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # the cores may be shared

    def _record(self, name: str, started: float) -> None:
        self.seconds.setdefault(name, []).append((self._now() - started) / self.chunk)


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:sd")
    parser.add_argument("--data", default="testbed:pairs")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=21, help="rounds; the first is not counted")
    parser.add_argument("--chunk", type=int, default=4, help="steps per round")
    parser.add_argument("--full", action="store_true", help="train all weights, beside a copy as the reference")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        turns, difference = measure(options, Path(folder))
    text = report(options, turns, difference)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"step_{'full_' * options.full}{turns.device.type}.md"
    file.write_text(text)
    print(f"{text}\nwritten to {file}")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> tuple[TakingTurns, float]:
    """The timings, and the difference between ours and bare in the loss of one batch."""
    config = configuration.from_mapping(
        {
            "output_dir": str(folder / "run"),
            "objective": {"name": "diffusion_dpo", "beta": 500},
            "model": {"path": options.model},
            "data": {"path": options.data, "limit": BATCHES * options.batch_size},
            **({"lora": None} if options.full else {}),
            "optim": {"lr": 1e-5},
            "train": {"steps": options.rounds * (options.chunk + 1) + 1, "batch_size": options.batch_size},
            "log": {"checkpoint_every": 10**9},
        }
    )
    accelerator = Accelerator(mixed_precision="no")
    device = accelerator.device
    pipeline = load_model(config, device)
    source = load_data(config, accelerator, pipeline, progress=True)
    prepare_denoiser(config, pipeline, source, accelerator)
    pipeline.drop_encoders()
    reference = build_reference(config.train, pipeline)
    loader = source.loader(
        seed=0, start_step=0, batch_size=options.batch_size, accumulate=1, rank=0, world=1, workers=0
    )
    batches = [source.to_batch(next(loader), device) for _ in range(BATCHES)]
    bare = Bare(config, batches, device)
    (folder / "run").mkdir()
    write_settings(folder / "run", configuration.to_mapping(config))
    rivals = {"bare": bare.cached, "with encoders, as others do": bare.encoding}
    stored = second = None
    if not options.full:
        stored = open_errors(config, folder, reference, source.fingerprint)
        second = SecondRun(replace(config, output_dir=str(folder / "second")), stored, accelerator)
        rivals[SECOND] = second.step
    turns = TakingTurns(source, rivals, options.rounds, options.chunk, device, second and second.read)
    task = Alignment(config, accelerator, reference, turns, errors=stored)  # type: ignore[arg-type]
    difference = disagreement(task, bare, batches[0])
    Loop(task, accelerator, config).run()
    if second:
        assert second.errors.reused == second.loop.step, "the second run has computed errors itself"
    return turns, difference


def disagreement(task: Alignment, bare: Bare, batch: Batch) -> float:
    """The difference of the two losses on one batch with the same noise, timesteps and (random) LoRA weights."""
    for pipeline in (task.pipeline, bare.pipeline):
        torch.manual_seed(0)
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
            elif parameter.requires_grad and "lora_" not in name:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    rng = SampleRNG(0, batch.keys, task.pipeline.process, "uniform", batch.latents.device)
    loss, _ = task.losses(task.pipeline.denoiser, (batch, rng))
    with torch.no_grad():
        noise = rng.normal("noise", (1, *batch.latents.shape[2:]))[:, 0]
        theirs = bare.loss(batch.latents, batch.conditioning["prompt_embeds"], noise, rng.timesteps())
    difference = float((loss.detach().mean() - theirs).abs())
    if difference > 1e-4 * float(theirs):
        sys.exit(f"error: ours and bare do not compute the same loss: {float(loss.mean())} and {float(theirs)}")
    return difference


def report(options: argparse.Namespace, turns: TakingTurns, difference: float) -> str:
    """The table as markdown."""
    ours, unit = turns.seconds["ours"][1:], "ms" if turns.device.type == "cuda" else "CPU ms"
    notes, rows = [], []
    if SECOND in turns.seconds:
        share = statistics.median(b / a for a, b in zip(ours, turns.seconds[SECOND][1:], strict=True))
        notes = [f"A step from the second run on takes {share:.3f} of a step of the first (median of the rounds)."]
    for name, seconds in turns.seconds.items():
        ratios = sorted(a / b for a, b in zip(ours, seconds[1:], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        spread = "" if name == "ours" else f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        rows.append(f"| {name} | {1000 * statistics.median(seconds[1:]):.1f} | {spread} |")
    return "\n".join(
        [
            "# One training step",
            "",
            f"`{' '.join(['python', 'benchmarks/step.py', *sys.argv[1:]])}`",
            "",
            f"{machine(turns.device)}. Python {platform.python_version()}, torch {torch.__version__}.",
            f"Diffusion-DPO, {'all weights' if options.full else 'LoRA rank 16'}, float32, {options.model}, "
            f"{options.batch_size} pairs per step; {len(ours)} rounds of {turns.chunk} steps each, interleaved. "
            f"On one batch with the same noise the two losses differ by {difference:.1e}.",
            *notes,
            "",
            f"| loop | {unit} per step (median) | ours / this: median of the rounds (middle half) |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def machine(device: torch.device) -> str:
    """The GPU's name, or the CPU's cores and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine()} CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
