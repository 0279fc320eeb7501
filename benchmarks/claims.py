"""Every objective's published claim, tried on the testbed: same base, same budget, several seeds, held-out prompts.

    python benchmarks/claims.py --work runs/claims             # all of it; killed, it continues where it was
    python benchmarks/claims.py --work runs/claims --only noisy

The base draws four images for each of some hundred train prompts, and the oracle scores them. Every condition below
is a selection of these images with labels, captions or likes of its own. Each method trains for the same number of
optimiser steps on the same number of groups a step. A method whose strength is Diffusion-DPO's beta has the value that
was searched for the quickstart on dev prompts. Any other has one knob with two values, of which the better one on dev
prompts (training seed 100) is taken. All figures are from test prompts that nothing was chosen on. Writes
`benchmarks/results/claims.json`, from which `docs/claims.md` is made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from claims_data import POOL_SEED, frame_score, make_conditions

from t2i_align.evaluation.stats import Comparison, compare
from t2i_align.inference.generate import sample, sample_seed
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_aligned
from t2i_align.inference.options import build_scorers
from t2i_align.testbed import prompts
from t2i_align.training.run import align

ROOT = Path(__file__).parent.parent
BASE = "testbed:sd"
TEST_FIRST = 256  # the quickstart's figures are from the 256 test prompts before these
EVALUATION_SEED = 70_000
TUNING_SEED = 100  # of training; the figures' seeds are 0, 1, 2
MARGINS = {"reward": 0.02, "faithfulness": 0.0, "quality": 0.02, "frame": 0.02}


BETA = ("objective.beta", 200.0)  # of the quickstart, for every method whose strength is Diffusion-DPO's beta


@dataclass(frozen=True)
class Method:
    """What is run: overrides of the common configuration, and the knob with its values."""

    label: str
    objective: str
    knob: tuple[Any, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A method under a condition, what its paper says, and the figure that decides.

    against: the method it is compared with, or "base". metric: a column of the oracle's verdict, or "frame".
    """

    condition: str
    method: str
    against: str
    says: str
    metric: str = "reward"


METHODS = {
    method.label: method
    for method in (
        Method("diffusion_dpo", "diffusion_dpo", BETA),
        Method("sft", "sft", ("optim.lr", 3e-4, 1e-3)),
        Method("mapo", "mapo", ("objective.weight", 0.1, 1.0)),
        Method("inpo", "inpo", BETA, {"objective.levels": 4}),
        Method(
            "smpo",
            "smpo",
            ("objective.gamma", 5, 20),
            {"objective.levels": 4, "objective.renoise": 0, "objective.beta": 200},
        ),
        Method("dmpo", "dmpo", BETA),
        Method("dspo", "dspo", ("objective.beta", 0.05, 0.5), {"objective.logit_beta": 200}),
        Method("ncp_dpo", "ncp_dpo", ("objective.beta", 400, 4000)),
        Method(
            "stable_reference",
            "diffusion_dpo",
            BETA,
            {
                "objective.time_weight": "snr",
                "train.timestep_sampling": "geometric",
                "train.reference_update": {"every": 16, "max_drift": 0.005},
            },
        ),
        Method("dcpo", "dcpo", BETA),
        Method("tdpo", "tdpo", BETA),
        Method("tkto", "tkto", ("objective.beta", 200, 800)),
        Method("kto", "kto", ("objective.beta", 200, 800)),
        Method(
            "softrepa",
            "softrepa",
            ("optim.lr", 3e-3, 3e-2),
            {"lora": None, "soft_tokens": {"count": 4}, "objective.negatives": 3},
        ),
        Method("cdpo", "diffusion_dpo", BETA, {"objective.label_smoothing": 0.3}),
        Method(
            "rdpo",
            "diffusion_dpo",
            BETA,
            {"objective.label_smoothing": 0.3, "objective.link": "robust"},
        ),
        Method("lcpo", "lcpo", BETA, {"objective.eta": 0.7}),
        Method("ipo", "diffusion_dpo", BETA, {"objective.link": "ipo"}),
        Method("rankdpo", "rankdpo", BETA),
        Method("lpo", "lpo", BETA),
        Method("guard", "diffusion_dpo", BETA, {"objective.guard": 0.5}),
    )
}

DPO = "diffusion_dpo"
CLAIMS = (
    Claim("pairs", DPO, "base", "beats its base on held-out prompts (2311.12908)"),
    Claim("pairs", "sft", DPO, "the winners alone teach less than the pairs do (2311.12908: DPO beats SFT)"),
    Claim("pairs", "ipo", DPO, "a bounded target resists over-fitting to deterministic labels (2310.12036)"),
    Claim("pairs", "mapo", DPO, "no reference is needed to match DPO (2406.06424)"),
    Claim("style", "mapo", DPO, "gains most where data and base differ in style (2406.06424)", "frame"),
    Claim("pairs", "inpo", DPO, "better than DPO (2503.18454)"),
    Claim("few steps", "inpo", DPO, "needs far fewer steps than DPO (2503.18454)"),
    Claim("pairs", "smpo", DPO, "better than DPO by soft labels and inversion (2506.02698)"),
    Claim("noisy", "smpo", DPO, "soft labels from scores help where preferences are unsure (2506.02698)"),
    Claim("pairs", "dmpo", DPO, "a reverse-KL objective is better than DPO's forward one (as in 2511.03317)"),
    Claim("pairs", "dspo", DPO, "score matching on preferences beats DPO (as in 2511.03317)"),
    Claim("pairs", "ncp_dpo", DPO, "errors of features beat errors of latents (2406.17636)"),
    Claim("pairs", "stable_reference", DPO, "a moving reference and weights by time beat DPO (2505.18736)"),
    Claim("similar", "guard", DPO, "safeguarding the winner helps where winner and loser are alike (2511.03317)"),
    Claim("noisy", "cdpo", DPO, "label smoothing helps with flipped labels"),
    Claim("noisy", "rdpo", DPO, "an unbiased loss helps with flipped labels (2403.00409)"),
    Claim("noisy", "lcpo", DPO, "weights by the policy's belief help with noisy labels (2509.24159)"),
    Claim("captions c", "dcpo", DPO, "a caption for each image beats one prompt for both (2502.06023)"),
    Claim("captions p", "dcpo", DPO, "the same with a perturbed prompt for the loser (2502.06023)"),
    Claim("captions h", "dcpo", DPO, "the hybrid is the best of the three (2502.06023)"),
    Claim("wrong prompts", "dcpo", DPO, "own captions help where prompts do not fit the images (2502.06023)"),
    Claim("texts", "tdpo", "base", "texts alone, without pairs of images, align (2509.25771)"),
    Claim("texts", "tdpo", DPO, "and do so better than DPO on pairs (2509.25771)"),
    Claim("texts", "tkto", "base", "the same with KTO's utility (2509.25771)"),
    Claim("likes", "kto", "base", "likes of single images align (2404.04465)"),
    Claim("likes", "kto", DPO, "and do so better than DPO on pairs (2404.04465)"),
    Claim(
        "texts", "softrepa", "base", "contrast of texts improves alignment with the text (2503.08250)", "faithfulness"
    ),
    Claim("lists", "rankdpo", DPO, "whole rankings beat their best and worst (2410.18013)"),
    Claim("lists", "lpo", DPO, "the listwise likelihood beats pairs (2510.01540)"),
)
# Where a condition has no DPO of its own, the one on the same images is meant.
DPO_CONDITION = {"captions c": "pairs", "captions p": "pairs", "captions h": "pairs", "texts": "pairs",
                 "likes": "pairs", "lists": "pairs"}  # fmt: skip
FEW = 4  # "few steps" are the budget's steps divided by this


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    condition: str
    method: str
    value: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.condition.replace(' ', '-')}_{self.method}_{self.value:g}_{self.seed}_{self.split}"


@dataclass(frozen=True)
class Budget:
    """The same for every method: optimiser steps, groups a step, and how samples are drawn."""

    steps: int
    batch_size: int
    prompts: int
    sampling_steps: int
    lr: float = 1e-3


def held_out(split: str, count: int) -> list[str]:
    first = TEST_FIRST if split == "test" else 0
    return prompts(split)[first : first + count]


def configuration(run: Run, budget: Budget, work: Path) -> dict[str, Any]:
    """The run as `align` takes it: the common values, the method's, and its knob."""
    method = METHODS[run.method]
    steps = max(1, budget.steps // FEW) if run.condition == "few steps" else budget.steps
    data = "pairs" if run.condition == "few steps" else run.condition
    values: dict[str, Any] = {
        "output_dir": str(work / "runs" / run.name),
        "model": {"path": BASE},
        "data": {"path": str(work / "data" / f"{data.replace(' ', '-')}.jsonl"), "cache_dir": str(work / "cache")},
        "objective": {"name": method.objective},
        "lora": {"rank": 16, "alpha": 16, "targets": "all"},
        "optim": {"lr": budget.lr, "schedule": "cosine", "warmup_steps": 5},
        "train": {"steps": steps, "batch_size": budget.batch_size, "seed": run.seed},
        "log": {"every": 10, "checkpoint_every": 10 * steps, "keep_checkpoints": 1},
    }
    knob, *_ = method.knob
    for key, value in {**method.overrides, knob: run.value}.items():
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return values


def judge(lora: str | None, split: str, budget: Budget) -> dict[str, list[float]]:
    """Scores of one sample a held-out prompt, by column."""
    texts = held_out(split, budget.prompts)
    seeds = [sample_seed(EVALUATION_SEED, i, 0) for i in range(len(texts))]
    pipeline = load_pipeline(BASE)
    options = {"steps": budget.sampling_steps, "guidance": 1.0, "batch_size": 48}
    if lora is None:
        images = sample(pipeline, texts, seeds, **options)
    else:
        with adapter_on(pipeline, resolve_aligned(lora)):
            images = sample(pipeline, texts, seeds, **options)
    (oracle,) = build_scorers("oracle")
    reward, parts = oracle.judge(images, texts)
    columns = {"reward": reward, **parts, "frame": torch.tensor([frame_score(image) for image in images])}
    return {name: [float(x) for x in values] for name, values in columns.items()}


def execute(run: Run, budget: Budget, work: Path, threads: int) -> None:
    """Train and judge one run; its result file is written last."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    result = align(configuration(run, budget, work), progress=False)
    trained = time.monotonic() - started
    scores = judge(str(result.weights), run.split, budget)
    record = {"run": run.__dict__, "seconds_training": round(trained, 1), "metrics": result.metrics, "scores": scores}
    write_json(work / "results" / f"{run.name}.json", record)
    print(f"{run.name}: {trained:.0f} s, reward {np.mean(scores['reward']):.3f}", flush=True)


def execute_all(runs: Sequence[Run], budget: Budget, work: Path, jobs: int) -> None:
    """All runs that have no result yet, `jobs` at a time."""
    missing = [run for run in dict.fromkeys(runs) if not (work / "results" / f"{run.name}.json").exists()]
    for run in missing:  # what a kill left half-done
        shutil.rmtree(work / "runs" / run.name, ignore_errors=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    arguments = [(run, budget, work, threads) for run in missing]
    if jobs == 1:
        for each in arguments:
            execute(*each)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        pool.starmap(execute, arguments, chunksize=1)


def result(run: Run, work: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((work / "results" / f"{run.name}.json").read_text())
    return record


def base_scores(split: str, budget: Budget, work: Path) -> dict[str, list[float]]:
    file = work / "results" / f"base_{split}.json"
    if not file.exists():
        write_json(file, judge(None, split, budget))
    scores: dict[str, list[float]] = json.loads(file.read_text())
    return scores


def settings_of(claim: Claim) -> list[tuple[str, str]]:
    """The (condition, method) that a claim needs trained: its own, and DPO's where that is what it is held against."""
    needed = [(claim.condition, claim.method)]
    if claim.against != "base":
        needed.append((DPO_CONDITION.get(claim.condition, claim.condition), claim.against))
    return needed


def tuned(settings: Iterable[tuple[str, str]], budget: Budget, work: Path, jobs: int) -> dict[tuple[str, str], float]:
    """For each setting, the knob's value with the higher win rate over the base on dev prompts."""
    settings = list(dict.fromkeys(settings))
    metric = {(claim.condition, claim.method): claim.metric for claim in CLAIMS}
    chosen = {(c, m): METHODS[m].knob[1] for c, m in settings}
    grids = {
        (c, m): [Run(c, m, v, TUNING_SEED, "dev") for v in METHODS[m].knob[1:]]
        for c, m in settings
        if len(METHODS[m].knob) > 2
    }
    execute_all([run for grid in grids.values() for run in grid], budget, work, jobs)
    base = base_scores("dev", budget, work)
    for setting, grid in grids.items():
        column = "frame" if setting[0] == "style" else metric.get(setting, "reward")
        rates = [versus(base[column], result(run, work)["scores"][column], column).win_rate for run in grid]
        chosen[setting] = grid[int(np.argmax(rates))].value
    return chosen


def versus(before: Sequence[float], after: Sequence[float], column: str, seeds: int = 1) -> Comparison:
    """Win rate of `after`; with several training seeds, both are their scores one after the other."""
    clusters = np.tile(np.arange(len(after) // seeds), seeds)
    return compare(before, after, clusters, margin=MARGINS.get(column, 0.0))


def figures(claims: Sequence[Claim], chosen: Mapping[tuple[str, str], float], budget: Budget, work: Path,
            seeds: int) -> list[dict[str, Any]]:  # fmt: skip
    """One row a claim: win rates against the base and against what it is held against."""
    base = base_scores("test", budget, work)
    rows = []
    for claim in claims:
        runs = [Run(claim.condition, claim.method, chosen[claim.condition, claim.method], s, "test")
                for s in range(seeds)]  # fmt: skip
        own = [result(run, work) for run in runs]

        def joined(records: list[dict[str, Any]], column: str) -> list[float]:
            return [value for record in records for value in record["scores"][column]]

        columns = dict.fromkeys([claim.metric, "reward", "faithfulness", "quality"])
        against_base = {c: versus(base[c] * seeds, joined(own, c), c, seeds) for c in columns}
        row: dict[str, Any] = {
            "claim": claim.__dict__,
            "knob": [METHODS[claim.method].knob[0], runs[0].value],
            "against_base": {c: summary(comparison) for c, comparison in against_base.items()},
            "by_seed": [round(versus(base[claim.metric], r["scores"][claim.metric], claim.metric).win_rate, 4)
                        for r in own],
        }  # fmt: skip
        decisive = against_base[claim.metric]
        if claim.against != "base":
            condition = DPO_CONDITION.get(claim.condition, claim.condition)
            other = [result(Run(condition, claim.against, chosen[condition, claim.against], s, "test"), work)
                     for s in range(seeds)]  # fmt: skip
            direct = {c: versus(joined(other, c), joined(own, c), c, seeds) for c in columns}
            row["against_dpo"] = {c: summary(comparison) for c, comparison in direct.items()}
            decisive = direct[claim.metric]
        row["verdict"] = verdict(claim, decisive, against_base)
        rows.append(row)
    return rows


def summary(comparison: Comparison) -> dict[str, Any]:
    return {
        "win_rate": round(comparison.win_rate, 4),
        "interval": [round(x, 4) for x in comparison.win_rate_ci],
        "mean_change": round(comparison.mean_change, 4),
    }


def verdict(claim: Claim, comparison: Comparison, against_base: Mapping[str, Comparison]) -> str:
    """Confirmed or reversed where the interval leaves 50 %; SFT's claim is that it loses.

    A figure that wins while the oracle's quality clearly falls below the base's was hacked: the images are spoilt.
    """
    if claim.metric == "frame" and against_base["quality"].win_rate_ci[1] < 0.5:
        return "hacked"
    low, high = comparison.win_rate_ci
    loses = claim.method == "sft"
    if (high < 0.5) if loses else (low > 0.5):
        return "confirmed"
    return "reversed" if ((low > 0.5) if loses else (high < 0.5)) else "not confirmed"


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(file)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder of data, runs and results")
    p.add_argument("--train-prompts", type=int, default=448, help="each with four images")
    p.add_argument("--steps", type=int, default=30, help="optimiser steps of every run")
    p.add_argument("--batch-size", type=int, default=16, help="groups a step")
    p.add_argument("--prompts", type=int, default=96, help="held-out prompts")
    p.add_argument("--sampling-steps", type=int, default=12)
    p.add_argument("--seeds", type=int, default=3, help="training seeds")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--only", action="append", help="a condition or method; may be given several times")
    return p


def main() -> None:
    args = parser().parse_args()
    budget = Budget(args.steps, args.batch_size, args.prompts, args.sampling_steps)
    claims = [c for c in CLAIMS if not args.only or c.condition in args.only or c.method in args.only]
    make_conditions(args.work / "data", BASE, args.train_prompts, steps=args.sampling_steps)
    settings = list(dict.fromkeys(setting for claim in claims for setting in settings_of(claim)))
    chosen = tuned(settings, budget, args.work, args.jobs)
    runs = [Run(c, m, chosen[c, m], seed, "test") for seed in range(args.seeds) for c, m in settings]
    execute_all(runs, budget, args.work, args.jobs)
    rows = figures(claims, chosen, budget, args.work, args.seeds)
    settings_used = {**budget.__dict__, "seeds": args.seeds, "train_prompts": args.train_prompts, "pool": POOL_SEED}
    write_json(ROOT / "benchmarks" / "results" / "claims.json", {"settings": settings_used, "rows": rows})
    print(yaml.safe_dump([{**r["claim"], "verdict": r["verdict"]} for r in rows], sort_keys=False))


if __name__ == "__main__":
    main()
