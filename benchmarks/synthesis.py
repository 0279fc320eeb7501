"""Preferences from prompts alone on the testbed: sampled, ranked by tiny scorers, trained on, judged by the oracle.

    python benchmarks/synthesis.py --scorers trained:runs/preference_models/expert_full_{0,1,2}

`t2i-align synthesize` samples four images per train prompt from the base and ranks them by the scorers. Diffusion-DPO
(best and worst) and RankDPO (all four) train on the same groups with the quickstart's settings and several training
seeds; as an upper bound, Diffusion-DPO also trains on the same images ranked by the oracle. The oracle evaluates on
test prompts that the quickstart does not use. Stages are kept in --work, and a second run continues. Writes
`benchmarks/results/synthesis.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from claims import MARGINS, TEST_FIRST, summary, versus
from claims_table import percent

from t2i_align.labeling.annotate import relabel
from t2i_align.labeling.synthesize import synthesize
from t2i_align.quickstart import quickstart
from t2i_align.testbed import prompts

RESULTS = Path(__file__).parent / "results"
BASE = "testbed:sd"
FIRST = 2400  # the first 2,400 train prompts are those of the bundled pairs
POOL_SEED = 6_000_000
COLUMNS = ("reward", "faithfulness", "quality")
RANKDPO = ("objective={name: rankdpo, beta: 200, gain: scores}",)
METHODS: dict[str, tuple[str, ...]] = {  # overrides of the quickstart
    "Diffusion-DPO, best and worst": (),
    "RankDPO, all four": RANKDPO,
    "Diffusion-DPO, best and worst by the oracle": (),
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scorers", nargs="+", required=True, help="specs of the scorers that rank")
    parser.add_argument("--work", type=Path, default=Path("runs/synthesis"), help="where stages are kept")
    parser.add_argument("--count", type=int, default=768, help="train prompts (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=256, help="held-out test prompts (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: %(default)s)")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="dev: to choose settings; no table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    options = parser.parse_args()
    texts = prompts("train")[FIRST : FIRST + options.count]
    groups = synthesize(
        texts, [BASE], options.scorers, options.work / "made", per_prompt=4, seed=POOL_SEED, steps=20, guidance=2.0,
        batch_size=64,
    ).out  # fmt: skip
    truth = options.work / "oracle.jsonl"
    relabel(groups, "oracle", truth, batch_size=64, force=True)
    held_out = prompts(options.split)[TEST_FIRST if options.split == "test" else 0 :][: options.prompts]
    results: dict[str, list[list[Row]]] = {label: [] for label in METHODS}
    for seed in range(options.seeds):
        for number, (label, overrides) in enumerate(METHODS.items()):
            folder = options.work / f"{options.split}-{options.steps}-{number}-{seed}"
            if not (folder / "pairs.jsonl").exists():
                data = [f"data.path={groups}"] + ([f"data.annotations=[{truth}]"] if "oracle" in label else [])
                changes = [*data, *overrides, f"train.seed={seed}", f"train.steps={options.steps}"]
                quickstart(changes, output=folder, prompts=held_out, count=len(held_out))
            results[label].append(rows_of(folder / "pairs.jsonl"))
    text = report(options, agreement(rows_of(groups), rows_of(truth)), results)
    print(text)
    if options.split == "test":
        (options.out / "synthesis.md").write_text(text)


def agreement(groups: list[Row], truth: list[Row]) -> dict[str, float]:
    """Share of image pairs in the oracle's order: by each scorer, by all together, and of best against worst."""
    rewards = {row["id"]: row["scores"] for row in truth}
    agreements: dict[str, list[float]] = {}
    for group in groups:
        reward, together = rewards[group["id"]], group["scores"]
        columns = {name: record["scores"] for name, record in group["by_scorer"].items()} | {"all together": together}
        pairs = {name: list(combinations(range(len(reward)), 2)) for name in columns}
        columns["best and worst by all"] = together
        pairs["best and worst by all"] = [(int(np.argmax(together)), int(np.argmin(together)))]
        for name, values in columns.items():
            agreements.setdefault(name, []).extend(
                0.5 + 0.5 * float(np.sign(values[i] - values[j]) * np.sign(reward[i] - reward[j]))
                for i, j in pairs[name]
                if abs(reward[i] - reward[j]) > MARGINS["reward"]
            )
    return {name: float(np.mean(values)) for name, values in agreements.items()}


def report(options: argparse.Namespace, right: dict[str, float], results: dict[str, list[list[Row]]]) -> str:
    """The tables as markdown."""
    command = " ".join(["python", "benchmarks/synthesis.py", *sys.argv[1:]])
    seeds = f"{options.seeds} training seeds"
    lines = ["# Preferences from prompts alone", "", f"`{command}`", "",
             f"{options.count} train prompts, four images each by {BASE} (20 steps, guidance 2); the quickstart's "
             f"settings with {options.steps} steps; {options.prompts} {options.split} prompts, one sample each, "
             f"{seeds}, 20 steps without guidance; 95 % intervals over prompts, training seeds pooled.", "",
             "| ranked by | image pairs in the oracle's order (its ties left out) |", "|---|---|",
             *(f"| {name} | {share:.1%} |" for name, share in right.items()), "",
             f"| trained | {' | '.join(f'{column} against the base' for column in COLUMNS)} | reward by seed |"
             " reward against the first row |", "|---|---|---|---|---|---|"]  # fmt: skip
    first = next(iter(results.values()))
    for label, runs in results.items():
        cells = [percent(summary(versus(joined(runs, c, 0), joined(runs, c, 1), c, options.seeds))) for c in COLUMNS]
        each = [versus(joined([run], "reward", 0), joined([run], "reward", 1), "reward").win_rate for run in runs]
        cells.append(", ".join(f"{100 * rate:.0f}" for rate in each))
        if runs is not first:
            direct = versus(joined(first, "reward", 1), joined(runs, "reward", 1), "reward", options.seeds)
            cells.append(percent(summary(direct)))
        else:
            cells.append("")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def joined(runs: list[list[Row]], column: str, side: int) -> list[float]:
    """The oracle's scores of the base (side 0) or the trained model (side 1), all runs concatenated."""
    scores = [row["scores"]["oracle"] for run in runs for row in run]
    if column == "reward":
        return [record[("before", "after")[side]] for record in scores]
    return [record["parts"][column][side] for record in scores]


def rows_of(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
