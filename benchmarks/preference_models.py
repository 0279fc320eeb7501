"""Preference models on the testbed: accuracy of a tiny CLIP, users with opposed tastes, over-optimisation.

    python benchmarks/preference_models.py --work runs/preference_models     # writes benchmarks/results/

Rendered images are free training data, and the oracle knows the ground truth. Five stages, each kept in --work:

- clip: `python -m tools.testbed clip`, pretrained on captions, without preferences;
- expert: pairs of a correct image and a wrong or degraded one, labelled by the expert; three fine-tunings with
  `train-scorer`, with different seeds, tested on pairs of held-out statements;
- sampled: these three fine-tuned further on the bundled pairs, sampled from a base model, tested on held-out prompts;
- people: pairs that differ in what captions leave open, labelled by users with two opposed tastes; Bradley-Terry (PAL
  with one prototype) against PAL, for seen and unseen users;
- audit: one scorer against combinations of the three, under optimisation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from t2i_align.reward_models.audit import audit
from t2i_align.reward_models.config import ScorerRun
from t2i_align.reward_models.train import ACCURACY, train_scorer
from t2i_align.testbed.captions import Statement, describe, draw_for, draw_image, draw_wrong, write
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import render, sample_scene
from t2i_align.testbed.world import split_of
from t2i_align.utils.files import atomic_file
from t2i_align.utils.settings import build
from tools.testbed.annotators import TRAITS, Annotator
from tools.testbed.clip import pretrain, save_clip
from tools.testbed.pairs import decode, encode_jpeg, take

RESULTS = Path(__file__).parent / "results"
# Weights over TRAITS of one taste; the other is its negative. SPREAD: standard deviation between persons.
TASTE = {"white": 0.6, "black": -0.6, "big": 0.8, "warm": 0.8, "crowded": 0.0, "left": 0.3, "high": 0.0}
SPREAD = 0.1
USERS, NEW_USERS, PAIRS_A_USER = 40, 40, 60
FEW = (1, 2, 5, 10)  # pairs per unseen user


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/preference_models"), help="where stages are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--look-steps", type=int, default=500, help="pretraining steps of CLIP's vision tower alone")
    parser.add_argument("--clip-steps", type=int, default=800, help="pretraining steps of both towers")
    parser.add_argument("--pairs", type=int, default=8000, help="training pairs of the expert")
    parser.add_argument("--steps", type=int, default=800, help="steps of each fine-tuning on them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--stage", choices=("clip", "expert", "sampled", "people", "audit", "table"), help="run only this stage"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[argparse.Namespace], None]] = {
        "clip": clip_stage, "expert": expert_stage, "sampled": sampled_stage, "people": people_stage,
        "audit": audit_stage, "table": table,
    }  # fmt: skip
    for name, stage in stages.items():
        if options.stage in (None, name):
            start = time.monotonic()
            stage(options)
            print(f"{name}: {time.monotonic() - start:.0f} s")
    return 0


def clip_stage(options: argparse.Namespace) -> None:
    if not (options.work / "clip").exists():
        save_clip(pretrain(options.look_steps, options.clip_steps, batch=64, lr=2.5e-3), options.work / "clip")


def expert_stage(options: argparse.Namespace) -> None:
    """Fine-tune on the expert's pairs."""
    for split, count in (("train", options.pairs), ("test", 1000)):
        file = options.work / f"expert_{split}.parquet"
        if not file.exists():
            rng = np.random.default_rng((7, split == "test"))
            write_pairs(file, expert_pairs(split, count, rng), [Annotator()] * count)
    for seed in range(options.seeds):
        for tune, loss in (("full", "pickscore"),) if seed else (("full", "pickscore"), ("linear", "imagereward")):
            name = f"expert_{tune}_{seed}"
            train(options.work / name, {
                "model": f"hf-clip:{options.work / 'clip'}", "tune": tune, "loss": loss,
                "data": {"path": str(options.work / "expert_train.parquet"), "holdout_prompts": 0.0,
                         "test": str(options.work / "expert_test.parquet")},
                "optim": {"lr": 3e-4 if tune == "full" else 3e-3, "schedule": "cosine", "warmup_steps": 30},
                "train": {"steps": options.steps, "batch_size": 32, "seed": seed, "balance": "none"},
            })  # fmt: skip


def sampled_stage(options: argparse.Namespace) -> None:
    """Fine-tune further on images of a base model."""
    for seed in range(options.seeds):
        start = options.work / f"expert_full_{seed}" / "scorer" / "clip"
        train(options.work / f"sampled_{seed}", {
            "model": f"hf-clip:{start}", "tune": "full", "loss": "pickscore",
            "data": {"path": "testbed:pairs", "holdout_prompts": 0.2},
            "optim": {"lr": 1e-4, "schedule": "cosine", "warmup_steps": 20},
            "train": {"steps": 200, "batch_size": 32, "seed": seed, "balance": "none"},
        })  # fmt: skip


def people_stage(options: argparse.Namespace) -> None:
    """Bradley-Terry against PAL for users with opposed tastes."""
    people = {f"u{i}": person(i) for i in range(USERS + NEW_USERS)}
    for part, users in (("seen", range(USERS)), ("new", range(USERS, USERS + NEW_USERS))):
        for split in ("train", "test"):
            file = options.work / f"people_{part}_{split}.parquet"
            if file.exists():
                continue
            rng = np.random.default_rng((11, part == "new", split == "test"))
            names = [f"u{i}" for i in users for _ in range(PAIRS_A_USER if split == "train" else 20)]
            write_pairs(file, open_pairs(split, len(names), rng), [people[name] for name in names], names)
    base = f"hf-clip:{options.work / 'clip'}"
    for name, prototypes in (("bt", 1), ("pal", 2)):
        train(options.work / f"people_{name}", {
            "model": base, "tune": "pal", "loss": "imagereward", "pal": {"prototypes": prototypes},
            "data": {"path": str(options.work / "people_seen_train.parquet"), "holdout_prompts": 0.0,
                     "test": str(options.work / "people_seen_test.parquet")},
            "optim": {"lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine"},
            "train": {"steps": 1500, "batch_size": 128, "balance": "user"},
        })  # fmt: skip
    for name in ("bt", "pal"):
        for few in FEW:
            data = options.work / f"people_new_{few}.parquet"
            first_of_each(options.work / "people_new_train.parquet", data, few)
            train(options.work / f"people_{name}_new_{few}", {
                "model": str(options.work / f"people_{name}"), "tune": "users", "loss": "imagereward",
                "data": {"path": str(data), "holdout_prompts": 0.0,
                         "test": str(options.work / "people_new_test.parquet")},
                "optim": {"lr": 0.1}, "train": {"steps": 150, "batch_size": 400, "balance": "user"},
            })  # fmt: skip


def audit_stage(options: argparse.Namespace) -> None:
    """One scorer against combinations of three, on the bundled pairs and under optimisation."""
    specs = [f"trained:{options.work / f'expert_full_{seed}'}" for seed in range(options.seeds)]
    for rule in ("mean_minus_std", "min"):
        members = [{"scorer": spec} for spec in specs]
        (options.work / f"{rule}.yaml").write_text(json.dumps({"rule": rule, "scorers": members}))
    scorers = [*specs, *(f"combine:{options.work / rule}.yaml" for rule in ("mean_minus_std", "min"))]
    audit("testbed:pairs", scorers, options.work / "audit", optimise=True, limit=1000, batch_size=64)


def expert_pairs(split: str, count: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(prompt, image, image): half correct against one wrong attribute, half correct against degraded."""
    for statement in statements(split, count, rng):
        first = draw_image(statement, rng)
        if rng.random() < 0.5:
            second = draw_image(draw_wrong(statement, rng), rng)
        else:
            second = draw_image(statement, rng, degraded=1.0)
        yield write(statement, rng), first, second


def open_pairs(split: str, count: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Two correct images of a prompt that leaves size and background open."""
    for statement in statements(split, count, rng, p_size=0.0, p_background=0.0):
        yield write(statement, rng), render(draw_for(statement, rng)), render(draw_for(statement, rng))


def statements(
    split: str, count: int, rng: np.random.Generator, p_size: float = 0.6, p_background: float = 0.8
) -> Iterator[Statement]:
    """Random statements of a split; test and training share none, whatever the phrasing."""
    count_left = count
    while count_left:
        statement = describe(sample_scene(rng), rng, p_size=p_size, p_background=p_background)
        if split_of(statement) == split:
            count_left -= 1
            yield statement


def person(number: int) -> Annotator:
    """Even numbers have TASTE, odd ones its negative; each with individual deviations."""
    rng = np.random.default_rng((13, number))
    sign = 1 if number % 2 == 0 else -1
    weights = [sign * TASTE[trait] + SPREAD * rng.standard_normal() for trait in TRAITS]
    return Annotator(user_id=number, weights=tuple(weights), care=0.2)


def write_pairs(
    file: Path,
    drawn: Iterator[tuple[str, np.ndarray, np.ndarray]],
    annotators: Sequence[Annotator],
    users: Sequence[str] | None = None,
) -> None:
    """Label each pair by its annotator, from the JPEG-decoded images, and write it with Pick-a-Pic's columns."""
    oracle, texts, left, right = Oracle(), [], [], []
    rng = np.random.default_rng(3)
    for text, first, second in drawn:
        if rng.random() < 0.5:
            first, second = second, first
        texts.append(text)
        left.append(encode_jpeg(torch.from_numpy(first).permute(2, 0, 1)))
        right.append(encode_jpeg(torch.from_numpy(second).permute(2, 0, 1)))
    sides = [oracle.judge(torch.stack([decode(data) for data in side]), texts) for side in (left, right)]
    labels = np.concatenate([a.label(take(sides[0], [i]), take(sides[1], [i]), rng) for i, a in enumerate(annotators)])
    table = {"caption": texts, "jpg_0": left, "jpg_1": right, "label_0": labels, "label_1": 1 - labels,
             "ranking_id": list(range(len(texts)))}  # fmt: skip
    if users is not None:
        table["user_id"] = list(users)
    with atomic_file(file) as temporary:
        pq.write_table(pa.table(table), temporary)


def first_of_each(source: Path, target: Path, few: int) -> None:
    """The first pairs of every user."""
    table = pq.read_table(source)
    seen: dict[str, int] = {}
    keep = []
    for row, user in enumerate(table["user_id"].to_pylist()):
        seen[user] = seen.get(user, 0) + 1
        keep += [row] if seen[user] <= few else []
    pq.write_table(table.take(keep), target)


def train(output: Path, values: dict[str, Any]) -> None:
    """Run `train-scorer` unless it has finished; an interrupted run continues."""
    if not (output / ACCURACY).exists():
        values = {"log": {"checkpoint_every": 100}, **values, "output_dir": str(output), "resume": True}
        print(f"{output.name}: {train_scorer(build(ScorerRun, values)).accuracy}")


def table(options: argparse.Namespace) -> None:
    """Write the table as markdown."""
    work: Path = options.work

    def row(name: str, key: str = "test") -> str:
        file = work / name / ACCURACY
        if not file.exists():
            return "not run"
        result = json.loads(file.read_text())[key]
        return f"{result['accuracy']:.1%} [{result['interval'][0]:.1%}, {result['interval'][1]:.1%}]"

    lines = ["# Preference models on the testbed", "",
             f"`python benchmarks/preference_models.py --pairs {options.pairs} --steps {options.steps}`", "",
             "Pair accuracy on held-out statements, 95 % intervals over prompts.", "",
             "| fine-tuned on the expert's pairs | accuracy |", "|---|---|"]  # fmt: skip
    lines += [f"| all weights, seed {seed} | {row(f'expert_full_{seed}')} |" for seed in range(options.seeds)]
    lines += [f"| linear head | {row('expert_linear_0')} |", ""]
    lines += ["| then on the bundled pairs of a base model | accuracy on held-out prompts |", "|---|---|"]
    lines += [f"| seed {seed} | {row(f'sampled_{seed}', 'new_prompts')} |" for seed in range(options.seeds)] + [""]
    lines += ["| users with two opposed tastes | Bradley-Terry (K = 1) | PAL (K = 2) |", "|---|---|---|"]
    lines += [f"| seen | {row('people_bt')} | {row('people_pal')} |"]
    for few in FEW:
        lines += [
            f"| unseen, {few} pair{'s' * (few > 1)} | {row(f'people_bt_new_{few}')} | {row(f'people_pal_new_{few}')} |"
        ]
    file = work / "audit" / "audit.json"
    if file.exists():
        report = json.loads(file.read_text())
        lines += ["", "| scorer | accuracy on the base model's pairs | best of n: oracle at 1, its best, at 64 | gap | "
                  "ascent: oracle at 0, its best, at the end | gap |", "|---|---|---|---|---|---|"]  # fmt: skip
        for name, accuracy in report["accuracy"].items():
            cells = [f"{accuracy['accuracy']:.1%} [{accuracy['interval'][0]:.1%}, {accuracy['interval'][1]:.1%}]"]
            for curve in report["curves"].get(name, []):
                oracle = curve["oracle"]
                end = f"{oracle[-1]:.3f} [{curve['low'][-1]:.3f}, {curve['high'][-1]:.3f}]"
                cells += [f"{oracle[0]:.3f}, {max(oracle):.3f}, {end}", f"{curve['gap'][-1]:.2f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "preference_models.md"
    target.write_text("\n".join([*lines, ""]))
    print(target.read_text())


if __name__ == "__main__":
    sys.exit(main())
