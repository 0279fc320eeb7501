"""Does DPO on independent samples stop the motion of a video model, and DenseDPO not (arXiv 2506.03517)?

    python benchmarks/video.py --work runs/video     # all of it; continues after a kill

On the testbed's moving scenes, from rendered clips with their captions: `t2i-align video pairs` makes vanilla and
structural pairs of the same clips, the oracle's quality of their frames labels them (whole clips, or each latent
frame), and every arm trains the same base on as many labelled pairs for as many steps, with the hyper-parameters that
were chosen for `testbed:wan` before (docs/families.md); nothing is selected here. Clips and test prompts are those of
one object on a straight path, not a small one. Writes `benchmarks/results/video.md`, anew after each run.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2i_align.data.media import save_clip, whole_clip
from t2i_align.evaluation.stats import Comparison, compare
from t2i_align.inference.generate import sample, sample_seed
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_aligned, resolve_base
from t2i_align.inference.options import build_scorers
from t2i_align.labeling.curate import PAIRS, pairs
from t2i_align.testbed.clips import DIRECTIONS, describe, parse, write
from t2i_align.testbed.world import prompts, split_of
from t2i_align.training.run import align
from t2i_align.utils.files import json_lines, read_json, write_json, write_text
from tools.testbed.evaluate import grid
from tools.testbed.faults import to_clip
from tools.testbed.wan import Wan

FPS = 16
SEGMENT = 2.5 / FPS  # seconds: each of the three latent frames of nine frames has a segment of its own, and its label
LATENT = (slice(0, 1), slice(1, 5), slice(5, 9))  # the frames of each latent frame
MARGIN = 0.02  # of quality: less is a tie, for labels as for wins
Scores = Mapping[str, Sequence[float]]
RESULTS = Path(__file__).parent / "results" / "video.md"
EVALUATION_SEED = 80_000


@dataclass(frozen=True)
class Arm:
    """A method and its labels. share: of the pairs; flipped: of the segments' labels."""

    kind: str
    objective: str
    share: float = 1.0
    flipped: float = 0.0


ARMS = {
    "vanilla DPO": Arm("independent", "diffusion_dpo"),
    "StructuralDPO": Arm("structural", "diffusion_dpo"),
    "DenseDPO": Arm("structural", "dense_dpo"),
    "DenseDPO, half of the labels": Arm("structural", "dense_dpo", share=1 / 2),
    "DenseDPO, a third of the labels": Arm("structural", "dense_dpo", share=1 / 3),
    "DenseDPO, 20 % flipped": Arm("structural", "dense_dpo", flipped=0.2),
    "DenseDPO, 40 % flipped": Arm("structural", "dense_dpo", flipped=0.4),
}


@dataclass(frozen=True)
class Claim:
    """That an arm changes `column` by more than `least` over another arm (None: the base); by sign -1, by less."""

    text: str
    column: str
    arm: str
    other: str | None = None
    sign: int = 1
    least: float = 0.0

    def verdict(self, low: float, high: float) -> str:
        """What an interval of the change says about it."""
        low, high = (low, high) if self.sign > 0 else (-high, -low)
        return "held" if low > self.least else "did not hold" if high < self.least else "open"


DENSE = "DenseDPO"
CLAIMS = [  # of the paper, "as good" and "little" taken as 0.03 of quality
    Claim("vanilla DPO loses motion", "flow", "vanilla DPO", sign=-1),
    Claim("vanilla DPO improves quality", "quality", "vanilla DPO"),
    Claim("DenseDPO improves quality", "quality", DENSE),
    Claim("DenseDPO moves more than vanilla DPO", "flow", DENSE, "vanilla DPO"),
    Claim("StructuralDPO moves more than vanilla DPO", "flow", "StructuralDPO", "vanilla DPO"),
    Claim("DenseDPO is as good as vanilla DPO", "quality", DENSE, "vanilla DPO", least=-0.03),
    Claim("DenseDPO is better than StructuralDPO", "quality", DENSE, "StructuralDPO"),
    Claim("with a third of the labels it is as good as vanilla DPO with all", "quality",
          "DenseDPO, a third of the labels", "vanilla DPO", least=-0.03),
    Claim("20 % flipped labels cost little", "quality", "DenseDPO, 20 % flipped", DENSE, least=-0.03),
    Claim("40 % flipped labels cost quality", "quality", "DenseDPO, 40 % flipped", DENSE, sign=-1),
    Claim("half of the labels cost quality", "quality", "DenseDPO, half of the labels", DENSE, sign=-1),
    Claim("40 % flipped labels cost more than half of the labels", "quality", "DenseDPO, 40 % flipped",
          "DenseDPO, half of the labels", sign=-1),
]  # fmt: skip


def simple(statement: Any) -> bool:
    """Whether it is of one object, not a small one, on a straight path."""
    (part, *others) = statement.parts
    return not others and part.path in DIRECTIONS and part.phrase.size != "small"


def test_prompts(count: int) -> list[str]:
    return [text for text in prompts("video-test") if simple(parse(text))][:count]


def make_real(folder: Path, count: int) -> None:
    """Rendered clips with captions of the train split."""
    rng, world = np.random.default_rng(0), Wan()
    made = 0
    while made < count:
        clip = world.draw_easy(rng)
        statement = describe(clip, rng)
        if split_of(statement) == "train":
            frames = torch.from_numpy(to_clip(clip.scenes, rng)).permute(0, 3, 1, 2)
            save_clip(frames, folder / f"{made:04d}.mp4", FPS, lossless=True)
            (folder / f"{made:04d}.txt").write_text(write(statement, rng))
            made += 1


def label(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` pairs that differ, with the votes of the oracle's quality on whole clips and on segments."""
    (oracle,) = build_scorers("motion_oracle")
    (degree,) = build_scorers("dynamic_degree")
    rows = []
    for line in (folder / PAIRS).read_text().splitlines():
        row = json.loads(line)
        clips = torch.stack([whole_clip(folder / name) for name in row["videos"]]).float() / 255
        texts = [row["prompt"]] * 2
        frames = oracle.frame_scores(clips, texts).numpy()
        parts = [frames[:, own].mean(1) for own in LATENT]
        rows.append({
            "id": row["id"], "prompt": row["prompt"], "videos": [str((folder / n).resolve()) for n in row["videos"]],
            "scores": votes(frames.mean(1)), "segment_scores": np.stack([votes(part) for part in parts], 1).tolist(),
            "segment_seconds": SEGMENT, "quality": frames.mean(1).tolist(),
            "flow": degree.judge(clips, texts)[1]["flow"].tolist(),
        })  # fmt: skip
    decided = [row for row in rows if row["scores"][0] != row["scores"][1]]
    if len(decided) < count:
        raise SystemExit(f"{folder}: {len(decided)} pairs differ, {count} are needed; raise --clips")
    return decided[:count]


def votes(scores: np.ndarray) -> list[float]:
    """1 for the better of two, 0 for the other; ½ each where they differ by the margin or less."""
    difference = float(scores[0] - scores[1])
    return [0.5, 0.5] if abs(difference) <= MARGIN else [float(difference > 0), float(difference < 0)]


def labelled(rows: Sequence[Mapping[str, Any]], arm: Arm) -> list[dict[str, Any]]:
    """An arm's share of the pairs, with segments' labels flipped at random."""
    rng, out = np.random.default_rng(1), []
    for row in rows[: round(arm.share * len(rows))]:
        first, second = np.array(row["segment_scores"])
        flip = rng.random(len(first)) < arm.flipped
        scores = [np.where(flip, second, first).tolist(), np.where(flip, first, second).tolist()]
        kept = {key: row[key] for key in ("id", "prompt", "videos", "scores")}
        dense = {"segment_scores": scores, "segment_seconds": SEGMENT} if arm.objective == "dense_dpo" else {}
        out.append(kept | dense)
    return out


def configuration(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What `align` takes: the values of the video run in docs/families.md, with fewer steps and smaller batches."""
    work = options.work
    return {
        "output_dir": str(work / "runs" / f"{slug(name)}_{seed}"),
        "model": {"path": options.base},
        "data": {"path": str(work / f"{slug(name)}.jsonl"), "cache_dir": str(work / "cache"), "fps": FPS},
        "objective": {"name": ARMS[name].objective, "beta": 200},
        "lora": {"rank": 16, "alpha": 16, "targets": "all"},
        "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 5},
        "train": {"steps": options.steps, "batch_size": options.batch_size, "seed": seed},
        "log": {"every": 10, "checkpoint_every": options.steps, "keep_checkpoints": 1},
    }


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


@functools.cache
def loaded(base: str) -> Any:
    return load_pipeline(resolve_base(base))


def judged(lora: str | None, options: argparse.Namespace, sheet: str) -> dict[str, list[float]]:
    """Scores of one sample for each test prompt; the frames of the first 24 become an image."""
    texts = test_prompts(options.prompts)
    seeds = [sample_seed(EVALUATION_SEED, i, 0) for i in range(len(texts))]
    pipeline = loaded(options.base)
    what: Any = {"steps": options.sampling_steps, "guidance": options.guidance, "batch_size": 32}
    if lora is None:
        clips = sample(pipeline, texts, seeds, **what)
    else:
        with adapter_on(pipeline, resolve_aligned(lora)):
            clips = sample(pipeline, texts, seeds, **what)
    pixels = torch.stack(clips).float() / 255
    grid(pixels[:24].flatten(0, 1), 2 * pixels.shape[1]).save(options.work / f"{sheet}.png")
    oracle, degree = build_scorers(["motion_oracle", "dynamic_degree"])
    parts = oracle.judge(pixels, texts)[1]
    moving, flow = degree.judge(pixels, texts)
    columns = {"quality": parts["quality"], "faithfulness": parts["faithfulness"], "temporal": parts["temporal"]}
    columns |= {"dynamic degree": moving, "flow": flow["flow"]}
    return {name: [float(value) for value in values] for name, values in columns.items()}


def kept(file: Path, make: Any) -> Any:
    """What a file holds; made and written where it is missing."""
    if not file.exists():
        started = time.monotonic()
        write_json(file, make())
        print(f"{file.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return json.loads(file.read_text())


def run(options: argparse.Namespace) -> str:
    """All stages; returns the report."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    kept(work / "real.json", lambda: make_real(work / "real", options.clips))
    data: dict[str, list[dict[str, Any]]] = {}
    arms = {name: arm for name, arm in ARMS.items() if not options.arms or name in options.arms}
    for kind in dict.fromkeys(arm.kind for arm in arms.values()):
        folder = work / kind
        made = {"steps": options.sampling_steps, "guidance": options.guidance, "fps": FPS, "lossless": True}
        settings = folder / f"{PAIRS}.settings.json"
        if not settings.exists() or not read_json(settings)["finished"]:
            pairs(work / "real", folder, model=options.base, independent=kind == "independent", progress=False, **made)
        data[kind] = kept(work / f"{kind}.json", lambda folder=folder: label(folder, options.pairs))
    base = kept(work / "base.json", lambda: judged(None, options, "base"))
    for name, arm in arms.items():
        write_text(work / f"{slug(name)}.jsonl", json_lines(labelled(data[arm.kind], arm)))
    scores: dict[str, list[Scores]] = {name: [] for name in arms}
    # The three methods first, then fewer labels, then flipped ones: what there is no time for is the least important.
    stage = {name: (arm.share < 1) + 2 * (arm.flipped > 0) for name, arm in arms.items()}
    for _, seed, name in sorted((stage[name], seed, name) for seed in range(options.seeds) for name in arms):
        made = kept(work / f"{slug(name)}_{seed}.json", lambda name=name, seed=seed: train(name, seed, options))
        scores[name].append(made)
        write_text(options.out, report(base, scores, data, options))
    return options.out.read_text()


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """One training run and the scores of its model."""
    configured = configuration(name, seed, options)
    shutil.rmtree(configured["output_dir"], ignore_errors=True)  # of a process that was killed
    return judged(str(align(configured, progress=False).weights), options, f"{slug(name)}_{seed}")


def against(before: Sequence[Scores], after: Sequence[Scores], column: str) -> Comparison:
    """All seeds of an arm against as many of another."""
    old, new = (np.concatenate([run[column] for run in runs]) for runs in (before, after))
    prompt = np.tile(np.arange(len(after[0][column])), len(after))
    return compare(old, new, prompt, margin=MARGIN if column == "quality" else 0.0)


def report(base: Scores, scores: Mapping[str, Sequence[Scores]], data: Any, options: argparse.Namespace) -> str:
    """The tables, in Markdown, of the runs that there are."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    scores = {name: runs for name, runs in scores.items() if runs}
    lines = [
        "# Video: motion and quality on the testbed", "",
        f"`python benchmarks/video.py {options.line}` at {commit}: {options.pairs} labelled pairs of "
        f"{options.clips} rendered clips, {options.steps} steps of {options.batch_size} pairs, training seeds pooled, "
        f"{len(base['quality'])} test prompts, {options.sampling_steps} steps, guidance {options.guidance:g}, quality "
        f"ties within {MARGIN}. 95 % intervals over prompts. Flow: of the fastest 5 % of pixels, pixels a step at 256 "
        "(`dynamic_degree`).", "",
        "## What the labels prefer", "",
        "| pairs | flow of the winner | of the loser | difference | quality of the winner | of the loser | "
        "correlation within a pair | latent frames: decided | pairs with both signs |",
        "|---|---|---|---|---|---|---|---|---|",
        *(preferred(kind, rows) for kind, rows in data.items()), "",
        "## What the models do", "",
        "| | seeds | quality: win rate over the base | mean quality | change | dynamic degree | mean flow | change | "
        "faithfulness |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    means = {column: float(np.mean(values)) for column, values in base.items()}
    lines.append(
        f"| base | | | {means['quality']:.3f} | | {means['dynamic degree']:.3f} | {means['flow']:.1f} | | "
        f"{means['faithfulness']:.3f} |"
    )
    for name, runs in scores.items():
        quality, flow, degree, faithful = (
            against([base] * len(runs), runs, column)
            for column in ("quality", "flow", "dynamic degree", "faithfulness")
        )
        lines.append(
            f"| {name} | {len(runs)} | {rate(quality)} | {quality.mean_after:.3f} | {interval(quality)} | "
            f"{degree.mean_after:.3f} | {flow.mean_after:.1f} | {interval(flow)} | {faithful.mean_after:.3f} |"
        )
    lines += ["", "## The paper's claims", "", "| | measured | |", "|---|---|---|"]
    for claim in CLAIMS:
        if claim.arm in scores and (claim.other is None or claim.other in scores):
            runs = scores[claim.arm]
            others = scores[claim.other][: len(runs)] if claim.other else [base] * len(runs)
            change = against(others, runs[: len(others)], claim.column)
            verdict = claim.verdict(*change.mean_change_ci)
            lines.append(f"| {claim.text} | {claim.column}: {interval(change)} | {verdict} |")
    return "\n".join([*lines, ""])


def preferred(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A row of the first table."""
    order = [np.argsort(row["scores"])[::-1] for row in rows]
    flow, quality = (
        np.array([np.array(row[key])[of] for row, of in zip(rows, order, strict=True)]) for key in ("flow", "quality")
    )
    signs = np.array([np.sign(np.subtract(*row["segment_scores"])) for row in rows])
    moved, better = np.diff(flow)[:, 0], np.diff(quality)[:, 0]
    together = (moved @ better) / np.sqrt((moved @ moved) * (better @ better))
    both = ((signs > 0).any(1) & (signs < 0).any(1)).mean()
    return (
        f"| {kind} | {flow[:, 0].mean():.1f} | {flow[:, 1].mean():.1f} | {interval(compare(flow[:, 1], flow[:, 0]))} | "
        f"{quality[:, 0].mean():.3f} | {quality[:, 1].mean():.3f} | {together:+.2f} | {(signs != 0).mean():.2f} | "
        f"{both:.2f} |"
    )


def rate(comparison: Comparison) -> str:
    low, high = comparison.win_rate_ci
    return f"{100 * comparison.win_rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def interval(change: Comparison) -> str:
    low, high = change.mean_change_ci
    return f"{change.mean_change:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pairs, runs and scores")
    parser.add_argument("--base", default="testbed:wan")
    parser.add_argument("--clips", type=int, default=80, help="rendered clips that pairs are made of")
    parser.add_argument("--pairs", type=int, default=32, help="labelled pairs of each kind")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="these only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shown = {key: value for key, value in vars(options).items() if key not in ("out", "arms")}
    options.line = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in shown.items())
    torch.set_num_threads(1)
    print(run(options))


if __name__ == "__main__":
    main()
