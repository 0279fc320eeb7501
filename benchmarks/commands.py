"""What commands cost beyond their work: their start, and `generate` against the plain diffusers pipeline.

    python benchmarks/commands.py     # writes benchmarks/results/commands_<device>.md

Starts are of fresh processes: the CPU seconds of the process, which the clock shows on an idle machine, medians.
`generate` and the pipeline's own call draw the same images in the same batches and write them as PNG, in turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from t2i_align.inference.generate import generate
from t2i_align.inference.models import load_pipeline
from t2i_align.inference.options import resolve_prompts
from t2i_align.utils.logging import silence_libraries

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUN = ["-m", "t2i_align"]
STARTS = {
    "`import t2i_align`": ["-c", "import t2i_align"],
    "`t2i-align --help`": [*RUN, "--help"],
    "`t2i-align train --help`": [*RUN, "train", "--help"],
    "`t2i-align evaluate --help`": [*RUN, "evaluate", "--help"],
    "a wrong key of `t2i-align train`": [*RUN, "train", "configs/sd15_diffusion_dpo_lora.yaml", "train.stesp=3"],
}


def start(arguments: list[str]) -> float:
    """CPU seconds of a fresh process, less those of an empty interpreter."""

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}

    def once(command: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    once(arguments)  # which leaves compiled files, as an installation does
    return statistics.median(once(arguments) - once(["-c", ""]) for _ in range(5))


def drawn(model: str, count: int, steps: int, batch: int, rounds: int) -> tuple[float, float, float]:
    """Seconds an image of `generate` and of the plain pipeline, and the median of their ratios."""
    pipeline = load_pipeline(model)
    clock = time.perf_counter if pipeline.device.type == "cuda" else time.process_time  # the CPU may be shared
    prompts, seconds = resolve_prompts("testbed:dev")[:count], []

    def ours(folder: Path) -> None:
        generate(pipeline, prompts, folder, steps=steps, batch_size=batch, progress=False)

    def plain(folder: Path) -> None:
        folder.mkdir()
        for first in range(0, count, batch):
            part = prompts[first : first + batch]
            generators = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
            images = pipeline.pipe(part, num_inference_steps=steps, generator=generators).images
            for number, image in enumerate(images, first):
                image.save(folder / f"{number:05}.png")

    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            times = []
            for name, draw in (("ours", ours), ("plain", plain)):
                started = clock()
                draw(Path(folder) / f"{name}{turn}")
                times.append((clock() - started) / count)
            seconds.append(times)
    first, second = zip(*seconds[1:], strict=True)  # the first round warms up
    ratio = statistics.median(one / other for one, other in zip(first, second, strict=True))
    return statistics.median(first), statistics.median(second), ratio


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:sd")
    parser.add_argument("--count", type=int, default=16, help="images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    silence_libraries()
    lines = ["| start | CPU seconds beyond Python's own |", "|---|---|"]
    for name, arguments in STARTS.items():
        lines.append(f"| {name} | {start(arguments):.3f} |")
        print(lines[-1], flush=True)
    ours, plain, ratio = drawn(options.model, options.count, options.steps, options.batch_size, options.rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unit = "ms" if device == "cuda" else "CPU ms"
    lines += ["", f"| drawing {options.count} images in {options.steps} steps | {unit} an image |", "|---|---|"]
    lines += [f"| `generate` | {1000 * ours:.1f} |", f"| the diffusers pipeline | {1000 * plain:.1f} |"]
    lines += ["", f"Ours / the pipeline's: {ratio:.3f}, the median of {options.rounds} rounds."]
    head = ["# Commands", "", f"`{' '.join(['python', 'benchmarks/commands.py', *sys.argv[1:]])}`", ""]
    head += [
        f"{os.cpu_count()}-core {platform.machine()} CPU, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, {options.model}.",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"commands_{device}.md").write_text("\n".join([*head, *lines, ""]))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
