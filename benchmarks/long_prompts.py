"""Long prompts on the testbed: truncated CLIP against segments (S) and S with the decomposed reward (S + R).

    python benchmarks/long_prompts.py --work runs/long_prompts    # all of it; continues after a kill

Long captions state 6 to 11 facts; the bundled text encoder reads the first three or four sentences. For each training
seed the base is fine-tuned on the same drawn images with long captions, truncated (T) and in segments (S); from S on,
the reward is trained with omega 0.3 and 1, the same number of steps. The reward's scorer (`sentence_scorer.py`) knows
single sentences. All are judged by the oracle over all sentences on test prompts, at the same seeds, and nothing was
selected on them. Intervals resample prompts, training seeds pooled. Writes `benchmarks/results/long_prompts.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentence_scorer
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from t2i_align.conditioning.config import SegmentsConfig
from t2i_align.config import ModelConfig
from t2i_align.evaluation.stats import interval
from t2i_align.inference.generate import sample, sample_seed
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_aligned
from t2i_align.testbed import prompts
from t2i_align.testbed.scenes import render, to_uint8
from t2i_align.testbed.world import LONG, split_of
from t2i_align.training.run import align
from t2i_align.utils.files import write_json

ROOT = Path(__file__).parent.parent
SEGMENTS = {"tokens": 32}
DRAWING_SEED, SAMPLING_SEED = 11, 90_000
OMEGAS = {"R-0.3": 0.3, "R-1.0": 1.0}
SIDES = {
    "base, truncated": "B", "T: trained, truncated": "T",
    "S: trained, segments": "S", "S + R, omega 0.3": "R-0.3", "S + R, omega 1": "R-1.0",
}  # fmt: skip
COLUMNS = ("faithfulness", "sentences", "last", "strict", "colour", "shape", "size", "relation", "count", "background",
           "quality")  # fmt: skip
DIFFERENCES = (
    ("S", "T", "last"), ("S", "T", "faithfulness"), ("S", "T", "sentences"), ("R-0.3", "S", "faithfulness"),
    ("R-0.3", "S", "sentences"), ("R-0.3", "S", "last"), ("R-0.3", "S", "quality"), ("R-1.0", "S", "faithfulness"),
    ("R-0.3", "R-1.0", "faithfulness"), ("R-0.3", "R-1.0", "quality"), ("R-0.3", "R-1.0", "diversity"),
    ("R-0.3", "S", "diversity"), ("R-1.0", "S", "diversity"),
)  # fmt: skip


def make_data(folder: Path, count: int) -> Path:
    """Drawn images with true long captions of the train split, as JSONL."""
    file, rng = folder / "captions.jsonl", np.random.default_rng(DRAWING_SEED)
    if file.exists():
        return file
    rows: list[str] = []
    while len(rows) < count:
        scene = LONG.sample(rng)
        statement = LONG.language.describe(scene, rng)
        if split_of(statement) == "train":
            name = f"{len(rows):05d}.png"
            Image.fromarray(to_uint8(render(scene))).save(folder / name)
            text = LONG.language.write(statement, rng)
            rows.append(json.dumps({"id": name, "prompt": text, "images": [name], "scores": [1.0]}) + "\n")
    file.write_text("".join(rows))
    return file


def make_scorer(folder: Path, steps: int) -> dict[str, str]:
    """The spec of the decomposed scorer for each omega, V being that of train prompts."""
    weights = folder / "scorer.pt"
    if not weights.exists():
        sentence_scorer.train(weights, steps)
        (folder / "corpus.txt").write_text("\n".join(prompts("long-train")[:512]))
    specs = {}
    for side, omega in OMEGAS.items():
        values = {"scorer": f"{sentence_scorer.__file__}:SentenceScorer:{weights}", "omega": omega,
                  "direction": "corpus.txt"}  # fmt: skip
        (folder / f"{side}.yaml").write_text(json.dumps(values))
        specs[side] = f"denscore:{folder}/{side}.yaml"
    return specs


def train(output: Path, base: str, seed: int, steps: int, **changes: Any) -> Path:
    """A run that continues where it was killed; returns its LoRA."""
    values: dict[str, Any] = {
        "output_dir": str(output), "model": {"path": base}, "lora": {"rank": 16, "alpha": 16, "targets": "all"},
        "resume": True, "log": {"every": 5, "checkpoint_every": 20, "keep_checkpoints": 1},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value
    values["train"] |= {"steps": steps, "seed": seed}
    start = time.monotonic()
    result = align(values, progress=False)
    numbers = {name: round(value, 4) for name, value in result.metrics.items() if "/t" not in name}
    print(f"{output.name}: {time.monotonic() - start:.0f} s, {numbers}", flush=True)
    return result.weights


def fine_tune(work: Path, side: str, seed: int, options: argparse.Namespace) -> None:
    """T, S, or S + R of a seed, which starts from its S."""
    if side in ("T", "S"):
        data = {"path": str(make_data(work / "data", options.images)), "cache_dir": str(work / "cache")}
        train(
            work / f"{side}-{seed}", options.model, seed, options.steps, data=data, objective={"name": "sft"},
            model={} if side == "T" else {"segments": SEGMENTS},
            optim={"lr": options.lr, "schedule": "cosine", "warmup_steps": 5},
            train={"batch_size": options.batch_size, "caption_dropout": 0.1},
        )  # fmt: skip
        return
    reward = {"name": "reward", "scorer": make_scorer(work, options.scorer_steps)[side], "schedule": "longalign",
              "sampling_steps": 5, "every": 2, "guidance": 1.0, "drift": True}  # fmt: skip
    train(
        work / f"{side}-{seed}", options.model, seed, options.reward_steps, model={"segments": SEGMENTS},
        data={"path": "testbed:long-train"}, objective=reward,
        lora={"init": str(resolve_aligned(work / f"S-{seed}").path)},
        optim={"lr": options.reward_lr, "warmup_steps": 2, "max_grad_norm": 0.3},
        train={"batch_size": options.reward_batch_size},
    )  # fmt: skip


def judge(work: Path, side: str, seed: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """The oracle's numbers on test prompts, one image each, and the diversity of several images of some of them."""
    file = work / f"scores-{side}-{seed}.json"
    if not file.exists():
        segments = None if side in ("B", "T") else SegmentsConfig(**SEGMENTS)
        pipeline = load_pipeline(ModelConfig(path=options.model, segments=segments))
        adapter = None if side == "B" else resolve_aligned(work / f"{side}-{seed}")
        texts = prompts("long-test")[: options.prompts]
        sampling: dict[str, Any] = {"steps": options.sampling_steps, "guidance": options.guidance, "batch_size": 32}
        with adapter_on(pipeline, adapter):
            images = sample(pipeline, texts, [sample_seed(SAMPLING_SEED, i, 0) for i in range(len(texts))], **sampling)
            several = [(i, k) for i in range(options.diverse) for k in range(1, 4)]
            more = sample(
                pipeline, [texts[i] for i, _ in several], [sample_seed(SAMPLING_SEED, i, k) for i, k in several],
                **sampling,
            )  # fmt: skip
        pixels = torch.stack([pil_to_tensor(image) for image in images]).float() / 255
        verdict = LONG.oracle().judge(pixels, texts)
        columns = {name: [float(x) for x in values] for name, values in verdict.columns().items()}
        columns["diversity"] = [
            diversity([images[i], *more[3 * i : 3 * i + 3]]) if i < options.diverse else float("nan")
            for i in range(len(texts))
        ]
        write_json(file, columns)
    columns = json.loads(file.read_text())
    return dict(columns)


def diversity(images: list[Image.Image]) -> float:
    """Root mean square difference of the pixels, in [0, 1], mean over pairs of a prompt's images."""
    arrays = [np.asarray(image, np.float64) / 255 for image in images]
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(arrays, 2)]))


def figure(values: np.ndarray) -> str:
    """Mean and interval of values [seeds, prompts]; NaN where one does not apply."""
    prompt = np.tile(np.arange(values.shape[1]), len(values))
    valid = np.isfinite(values.ravel())
    numbers = values.ravel()[valid]
    low, high = interval(prompt[valid], numbers, np.ones_like(numbers))
    return f"{numbers.mean():.3f} [{low:.3f}, {high:.3f}]"


def report(work: Path, options: argparse.Namespace) -> str:
    """The tables as markdown, of the runs that are judged."""
    scores: dict[str, dict[str, dict[int, list[float]]]] = {}
    for side in SIDES.values():
        for seed in range(options.seeds):
            if (work / f"scores-{side}-{seed}.json").exists():
                for name, values in judge(work, side, seed, options).items():
                    scores.setdefault(side, {}).setdefault(name, {})[seed] = values
    judged = {label: scores[side] for label, side in SIDES.items() if side in scores}
    arguments = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in vars(options).items() if key != "work")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = ["# Long prompts on the testbed", "", f"`python benchmarks/long_prompts.py {arguments}`", "",
             f"At commit {commit.strip()}, torch {torch.__version__}, {torch.get_num_threads()} thread. "
             f"{options.prompts} test prompts, {options.sampling_steps} steps, guidance {options.guidance:g}; means, "
             "95 % intervals over prompts, training seeds pooled.", ""]  # fmt: skip
    lines += ["| model | seeds | " + " | ".join(COLUMNS[:4]) + " | diversity |", "|---" * 7 + "|"]
    for label, columns in judged.items():
        cells = [figure(np.array([*columns[name].values()], float)) for name in (*COLUMNS[:4], "diversity")]
        lines.append(f"| {label} | {len(columns['last'])} | {' | '.join(cells)} |")
    lines += ["", "| model | " + " | ".join(COLUMNS[4:]) + " |", "|---" * (1 + len(COLUMNS[4:])) + "|"]
    for label, columns in judged.items():
        means = (np.nanmean(np.array([*columns[name].values()], float)) for name in COLUMNS[4:])
        lines.append(f"| {label} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    lines += ["", "| difference, same prompts and seeds | in | mean | by training seed |", "|---|---|---|---|"]
    for one, other, name in DIFFERENCES:
        both = sorted(scores.get(one, {}).get(name, {}).keys() & scores.get(other, {}).get(name, {}).keys())
        if both:
            change = np.array([np.subtract(scores[one][name][seed], scores[other][name][seed]) for seed in both])
            by_seed = ", ".join(f"{value:+.3f}" for value in np.nanmean(change, axis=1))
            lines.append(f"| {one} − {other} | {name} | {figure(change)} | {by_seed} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/long_prompts"))
    parser.add_argument("--model", default="testbed:sd")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=384, help="drawn, with long captions")
    parser.add_argument("--steps", type=int, default=60, help="of the fine-tunings on them")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scorer-steps", type=int, default=300)
    parser.add_argument("--reward-steps", type=int, default=30)
    parser.add_argument("--reward-batch-size", type=int, default=4)
    parser.add_argument("--reward-lr", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--diverse", type=int, default=12, help="prompts of which four images are sampled")
    parser.add_argument("--sampling-steps", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=1.0, help="of the images that are judged")
    options = parser.parse_args()
    options.work = options.work.resolve()
    (options.work / "data").mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):  # seed by seed, so that a run that is ended has all arms of some seeds
        for side in SIDES.values():
            judged = (options.work / f"scores-{side}-{seed}.json").exists()
            if side != "B" and not judged:
                fine_tune(options.work, side, seed, options)
            if side != "B" or seed == 0:
                judge(options.work, side, seed, options)
    text = report(options.work, options)
    (ROOT / "benchmarks" / "results" / "long_prompts.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
