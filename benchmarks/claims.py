"""Test every objective's published claim on the testbed: same base, same budget, several seeds, held-out prompts.

    python benchmarks/claims.py --work runs/claims             # all of it; continues after a kill
    python benchmarks/claims.py --work runs/claims --only noisy

Four images per prompt are sampled from the base for some hundred train prompts and scored by the oracle. Each condition
(see `claims_data`) is a subset of these images with its own labels, captions or likes. Every method trains for the same
number of optimiser steps with the same batch size. Methods that share Diffusion-DPO's beta use the value tuned for the
quickstart on dev prompts; every other method has one hyper-parameter with two values, selected on dev prompts (training
seed 100). All figures are from test prompts that were not used for any selection. Writes `claims.json` to
`benchmarks/results/`, from which `claims_table.py` makes the tables in `docs/claims.md`.
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
from t2i_align.inference.options import build_scorers, cpu_computes_bf16
from t2i_align.testbed import prompts
from t2i_align.training.run import align
from t2i_align.utils.files import write_json

ROOT = Path(__file__).parent.parent
BASE = "testbed:sd"
TEST_FIRST = 256  # the first 256 test prompts are the quickstart's
EVALUATION_SEED = 70_000
TUNING_SEED = 100  # training seed of the selection on dev prompts; the figures' seeds are 0, 1, 2
MARGINS = {"reward": 0.02, "faithfulness": 0.0, "quality": 0.02, "frame": 0.02}
BETA = ("objective.beta", 60.0)  # the quickstart's value, for every method with Diffusion-DPO's beta
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Method:
    """An objective with its overrides of the common configuration, and the tuned key with its values."""

    label: str
    objective: str
    knob: tuple[Any, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A published claim: a method under a condition against a baseline, decided by one metric.

    against: the baseline method, or "base". metric: one of the oracle's scores, or "frame".
    """

    condition: str
    method: str
    against: str
    statement: str
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
            {"objective.levels": 4, "objective.renoise": 0, "objective.beta": 60},
        ),
        Method("dmpo", "dmpo", BETA),
        Method("dspo", "dspo", ("objective.beta", 0.05, 0.5), {"objective.logit_beta": 60}),
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
# Conditions in which DPO itself cannot be trained: it is taken from the pairs of the same images.
DPO_CONDITION = {"captions c": "pairs", "captions p": "pairs", "captions h": "pairs", "texts": "pairs",
                 "likes": "pairs", "lists": "pairs"}  # fmt: skip
FEW = 4  # "few steps" divides the steps by this


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
    """What all methods share: optimiser steps, batch size (groups per step), held-out prompts, sampling."""

    steps: int
    batch_size: int
    prompts: int
    sampling_steps: int
    lr: float = 1e-3


def held_out(split: str, count: int) -> list[str]:
    first = TEST_FIRST if split == "test" else 0
    return prompts(split)[first : first + count]


def configuration(run: Run, budget: Budget, work: Path) -> dict[str, Any]:
    """The run's configuration for `align`: common values, the method's overrides, and the tuned key."""
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
        "train": {
            "steps": steps,
            "batch_size": budget.batch_size,
            "seed": run.seed,
            "precision": "bf16" if cpu_computes_bf16() else "fp32",
            "attention": "math",
        },
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
    """The oracle's scores, by metric, of one sample per held-out prompt; lora None is the base."""
    texts = held_out(split, budget.prompts)
    seeds = [sample_seed(EVALUATION_SEED, i, 0) for i in range(len(texts))]
    pipeline = load_pipeline(BASE)
    autocast = torch.bfloat16 if cpu_computes_bf16() else None
    options = {"steps": budget.sampling_steps, "guidance": 1.0, "batch_size": 48, "autocast": autocast}
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
    """Train and evaluate one run; the result file is written last, so its existence means the run is complete."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    result = align(configuration(run, budget, work), progress=False)
    trained = time.monotonic() - started
    scores = judge(str(result.weights), run.split, budget)
    record = {"run": run.__dict__, "seconds_training": round(trained, 1), "metrics": result.metrics, "scores": scores}
    write_json(work / "results" / f"{run.name}.json", record)
    print(f"{run.name}: {trained:.0f} s, reward {np.mean(scores['reward']):.3f}", flush=True)


def execute_all(runs: Sequence[Run], budget: Budget, work: Path, jobs: int) -> None:
    """Execute the runs that have no result file yet, `jobs` in parallel."""
    missing = [run for run in dict.fromkeys(runs) if not (work / "results" / f"{run.name}.json").exists()]
    for run in missing:  # remove unfinished runs of an earlier, killed process
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
    """The (condition, method) settings that a claim needs: its own, and its baseline's."""
    needed = [(claim.condition, claim.method)]
    if claim.against != "base":
        needed.append((DPO_CONDITION.get(claim.condition, claim.condition), claim.against))
    return needed


def tuned(settings: Iterable[tuple[str, str]], budget: Budget, work: Path, jobs: int) -> dict[tuple[str, str], float]:
    """For each setting, the value of its key with the higher win rate against the base on dev prompts."""
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
    """Win rate of `after`. With several training seeds, both hold the scores of all seeds, concatenated."""
    clusters = np.tile(np.arange(len(after) // seeds), seeds)
    return compare(before, after, clusters, margin=MARGINS.get(column, 0.0))


def figures(claims: Sequence[Claim], chosen: Mapping[tuple[str, str], float], budget: Budget, work: Path,
            seeds: int) -> list[dict[str, Any]]:  # fmt: skip
    """One row per claim: win rates against the base and against the baseline method."""
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
    """Confirmed or reversed if the interval excludes 50 % (SFT's claim is that it loses).

    Hacked: the frame metric improves while the oracle's quality falls clearly below the base's.
    """
    if claim.metric == "frame" and against_base["quality"].win_rate_ci[1] < 0.5:
        return "hacked"
    low, high = comparison.win_rate_ci
    loses = claim.method == "sft"
    if (high < 0.5) if loses else (low > 0.5):
        return "confirmed"
    return "reversed" if ((low > 0.5) if loses else (high < 0.5)) else "not confirmed"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder for data, runs and their results")
    p.add_argument("--train-prompts", type=int, default=448, help="train prompts, four images each")
    p.add_argument("--steps", type=int, default=30, help="optimiser steps of every run")
    p.add_argument("--batch-size", type=int, default=16, help="groups per step")
    p.add_argument("--prompts", type=int, default=96, help="held-out prompts")
    p.add_argument("--sampling-steps", type=int, default=12)
    p.add_argument("--seeds", type=int, default=3, help="training seeds")
    p.add_argument("--jobs", type=int, default=2, help="parallel runs")
    p.add_argument("--only", action="append", help="a condition or method; can be repeated")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for claims.json")
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
    write_json(args.out / "claims.json", {"settings": settings_used, "rows": rows})
    print(yaml.safe_dump([{**r["claim"], "verdict": r["verdict"]} for r in rows], sort_keys=False))


if __name__ == "__main__":
    main()
