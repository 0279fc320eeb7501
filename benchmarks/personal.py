"""Personal preferences (PPD) on the testbed: people with opposed tastes, new people from a few of their choices.

    python benchmarks/personal.py --work runs/personal     # writes benchmarks/results/personal.md

Captions of the pairs state neither size, background nor place, and the two images of a pair are both correct: they
differ in what people have tastes about. A user likes a light or a dark background, big or small shapes, and things on
the left or on the right: eight tastes in opposed pairs, with deviations of each user's own. Stages, kept in --work:

- clip: `python -m tools.testbed clip`, which has seen captions and no preference, as the embedder;
- pairs: choices of the users in training, and of new ones;
- ppd: Diffusion-DPO with a personal branch;
- served: images for each user, judged by that user: against the base, with 1 to 16 choices, with choices shuffled
  between users, for users seen in training; mixes of two users; identification; time;
- population: Diffusion-DPO on the same pairs as a LoRA for all, judged by the same users.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from preference_models import open_pairs, statements, write_pairs
from torch import Tensor

from t2i_align import align
from t2i_align.conditioning import personal
from t2i_align.conditioning.preferences import rebuilt
from t2i_align.data import readers
from t2i_align.data.schema import Group
from t2i_align.data.users import choices_by_user
from t2i_align.evaluation.personal import UserRate, identification, liked, win_rate
from t2i_align.inference.generate import sample_seed
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_adapter
from t2i_align.inference.users import tokens_of
from t2i_align.testbed.captions import write
from t2i_align.testbed.oracle import Oracle
from t2i_align.utils import html
from t2i_align.utils.files import write_json, write_text
from tools.testbed.annotators import TRAITS, Annotator

RESULTS = Path(__file__).parent / "results"
AXES: tuple[dict[str, float], ...] = ({"white": 0.7, "black": -0.7}, {"big": 0.9}, {"left": 0.4})  # a taste's signs
SPREAD = 0.1  # standard deviation between users of a taste
EXAMPLES, COUNTS = 4, (1, 4, 16)
MIX = (0.0, 0.25, 0.5, 0.75, 1.0)
SERVED = "served.json"
MARGIN = 0.02  # of scores that are a tie, as the annotators have it
SAMPLING = {"steps": 10, "guidance": 1.0, "batch_size": 16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/personal"), help="where stages are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--model", default="testbed:sd", help="base model")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP (default: one is trained)")
    parser.add_argument("--users", type=int, default=52, help="users in training")
    parser.add_argument("--new-users", type=int, default=12, help="users who are not")
    parser.add_argument("--pairs", type=int, default=16, help="choices of each user in training")
    parser.add_argument("--prompts", type=int, default=12, help="test prompts, of which each user gets an image")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--population-lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=200.0)
    parser.add_argument("--stage", choices=("clip", "pairs", "ppd", "served", "population", "table"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.clip = options.clip or options.work / "clip"
    stages: dict[str, Callable[[argparse.Namespace], None]] = {
        "clip": clip_stage, "pairs": pairs_stage, "ppd": ppd_stage, "served": served_stage,
        "population": population_stage, "table": table,
    }  # fmt: skip
    for name, stage in stages.items():
        if options.stage in (None, name):
            start = time.monotonic()
            stage(options)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


def person(number: int) -> Annotator:
    """The bits of the number are the signs of the taste's axes."""
    rng = np.random.default_rng((17, number))
    weights = dict.fromkeys(TRAITS, 0.0)
    for bit, axis in enumerate(AXES):
        for trait, weight in axis.items():
            weights[trait] = (1 if number >> bit & 1 else -1) * weight
    return Annotator(user_id=number, care=0.2, margin=MARGIN,
                     weights=tuple(weights[trait] + SPREAD * rng.standard_normal() for trait in TRAITS))  # fmt: skip


def judge(user: str, pixels: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
    """How much a user likes images."""
    return person(int(user)).score(Oracle().judge(pixels, prompts))


def clip_stage(options: argparse.Namespace) -> None:
    if not options.clip.exists():
        command = [sys.executable, "-m", "tools.testbed", "clip", "--out", str(options.clip)]
        subprocess.run([*command, "--look", "300", "--steps", "250", "--batch", "32"], check=True)


def pairs_stage(options: argparse.Namespace) -> None:
    """Choices of the users 0 … in training, and of new ones after them."""
    for name, first, count, each in (("seen", 0, options.users, options.pairs),
                                     ("new", options.users, options.new_users, COUNTS[-1])):  # fmt: skip
        file = options.work / f"{name}.parquet"
        if not file.exists():
            users = [number for number in range(first, first + count) for _ in range(each)]
            drawn = open_pairs("train", len(users), np.random.default_rng((19, first)))
            write_pairs(file, drawn, [person(number) for number in users], [str(number) for number in users])


def trained(options: argparse.Namespace, name: str, rate: float, **more: Any) -> None:
    """Diffusion-DPO on the pairs of the users in training; a run that was stopped continues."""
    align({
        "output_dir": str(options.work / name), "resume": True,
        "model": {"path": options.model}, "data": {"path": str(options.work / "seen.parquet")},
        "objective": {"name": "diffusion_dpo", "beta": options.beta},
        "optim": {"lr": rate, "schedule": "cosine", "warmup_steps": 10},
        "train": {"steps": options.steps, "batch_size": options.batch},
        "log": {"every": 5, "checkpoint_every": 25}, **more,
    })  # fmt: skip


def ppd_stage(options: argparse.Namespace) -> None:
    embedder = {"embedder": f"hf-clip:{options.clip}", "examples": [1, 8], "dropout": 0.05}
    trained(options, "ppd", options.lr, lora=None, personal=embedder)


def population_stage(options: argparse.Namespace) -> None:
    """At the rate of the quickstart's LoRA."""
    trained(options, "population", options.population_lr, lora={"rank": 16, "alpha": 16.0, "targets": "all"})
    likes, out = np.load(options.work / "likes.npz"), json.loads((options.work / SERVED).read_text())
    prompts, seeds, new, seen = tests(options)
    pipeline = load_pipeline(options.model, device="cpu")
    with adapter_on(pipeline, resolve_adapter(options.work / "population")):
        population, population_seen = (
            liked(pipeline, dict.fromkeys(users), prompts, seeds, judge, **SAMPLING) for users in (new, seen)
        )
    out["population over base"] = rate(likes["base"], population)
    out["new users over population"] = rate(population, likes["new"])
    out["seen users over population"] = rate(population_seen, likes["seen"])
    write_json(options.work / SERVED, out)


def tests(options: argparse.Namespace) -> tuple[list[str], list[int], dict[str, list[Group]], dict[str, list[Group]]]:
    """Test prompts and their seeds, and the choices of new users and of as many in training."""
    rng = np.random.default_rng(23)
    prompts = [write(one, rng) for one in statements("test", options.prompts, rng, p_size=0.0, p_background=0.0)]
    new, seen = (choices_by_user(readers.read(options.work / f"{name}.parquet"), name) for name in ("new", "seen"))
    seeds = [sample_seed(0, index, 0) for index in range(len(prompts))]
    return prompts, seeds, new, {user: seen[user] for user in [*seen][: len(new)]}


@torch.no_grad()
def served_stage(options: argparse.Namespace) -> None:
    """Images for all users, and what they think of them."""
    prompts, seeds, new, seen = tests(options)
    rng, pipeline = np.random.default_rng(29), load_pipeline(options.model, device="cpu")

    def scores(users: dict[str, Any]) -> NDArray[np.float64]:
        return liked(pipeline, users, prompts, seeds, judge, **SAMPLING)

    base, base_seen = scores(dict.fromkeys(new)), scores(dict.fromkeys(seen))
    out: dict[str, Any] = {}
    with adapter_on(pipeline, resolve_adapter(options.work / "ppd")):
        branch: personal.Personal = pipeline.denoiser.personal
        embedder = rebuilt(branch.embedding)

        def tokens(choices: dict[str, list[Group]], count: int, start: int = 0) -> dict[str, Tensor]:
            return {
                user: tokens_of(branch, embedder, all[start : start + count], user) for user, all in choices.items()
            }

        likes: dict[int, NDArray[np.float64]] = {}
        for count in COUNTS:
            likes[count] = scores(tokens(new, count))
            out[f"new users, {count}"] = rate(base, likes[count])
        likes_seen = scores(tokens(seen, EXAMPLES))
        out["seen users"] = rate(base_seen, likes_seen)
        out["shuffled"] = rate(base, scores(tokens(shuffled(new, rng), EXAMPLES)))
        out["mix"] = mix(new, scores, tokens(new, EXAMPLES))
        parts = [tokens(new, EXAMPLES, start) for start in range(0, COUNTS[-1], EXAMPLES)]
        for top in (1, 5):
            found = identification([torch.stack([part[user] for part in parts]) for user in new], top)
            out[f"identification, top {top}"] = [found[0], *found[1]]
        out["time"] = overhead(pipeline, prompts, seeds, next(iter(tokens(new, EXAMPLES).values())))
        out["parameters"] = sum(parameter.numel() for parameter in branch.parameters())
    np.savez(options.work / "likes.npz", base=base, new=likes[EXAMPLES], seen=likes_seen)
    write_json(options.work / SERVED, out)
    table(options)


def rate(before: NDArray[np.float64], after: NDArray[np.float64]) -> list[float]:
    """Win rate, its interval, and the lowest and highest of a user."""
    found: UserRate = win_rate(before, after, margin=MARGIN)
    return [found.rate, *found.interval, min(found.by_user), max(found.by_user)]


def shuffled(choices: dict[str, list[Group]], rng: np.random.Generator) -> dict[str, list[Group]]:
    """Each user with as many choices as before, of all users at random."""
    everything = [group for own in choices.values() for group in own]
    order = iter(rng.permutation(len(everything)))
    return {user: [everything[next(order)] for _ in own] for user, own in choices.items()}


def mix(
    users: dict[str, list[Group]], scores: Callable[[dict[str, Any]], NDArray[np.float64]], tokens: dict[str, Tensor]
) -> dict[str, list[list[float]]]:
    """How much the first of two opposed users likes images for mixes of both, beside its taste for its own: [mean of
    each weight] by pair."""
    names, out = [*users], {}
    for first in names[:3]:
        other = next(name for name in names if int(name) % 8 == 7 - int(first) % 8)
        means = [scores({first: weight * tokens[first] + (1 - weight) * tokens[other]}).mean() for weight in MIX]
        out[f"{other} to {first}"] = [float(mean) for mean in means]
    return out  # type: ignore[return-value]


def overhead(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], tokens: Tensor) -> list[float]:
    """Seconds of sampling for nobody and for a user, medians of five in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        for own, whose in zip(times, (None, tokens), strict=True):
            branch = pipeline.denoiser.personal
            branch.off = whose is None
            with personal.serving(pipeline.denoiser, whose, guided=False):
                start = time.process_time()
                pipeline.generate(prompts[:8], seeds[:8], **SAMPLING)
                own.append(time.process_time() - start)
            branch.off = False
    return [statistics.median(own) for own in times]


def table(options: argparse.Namespace) -> None:
    """Write the tables as markdown, and the curves as a page in --work."""
    out = json.loads((options.work / SERVED).read_text())

    def row(name: str, key: str) -> str:
        if key not in out:
            return f"| {name} | not run | |"
        found, low, high, least, most = out[key]
        return f"| {name} | {found:.1%} [{low:.1%}, {high:.1%}] | {least:.0%} … {most:.0%} |"

    names = ("users", "new_users", "pairs", "prompts", "steps", "batch", "lr", "population_lr", "beta", "model")
    command = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
    lines = [
        "# Personal preferences on the testbed", "", f"`python benchmarks/personal.py {command}`", "",
        f"{options.users} users in training, {options.new_users} new, eight tastes; {options.prompts} test prompts. "
        "Users judge the images made for them, at the same seeds. Intervals of 95 % over users and prompts.", "",
        "| images for each user, of these choices | win rate over the base | of single users |", "|---|---|---|",
        *(row(f"new users, {count} choice{'s' * (count > 1)}", f"new users, {count}") for count in COUNTS),
        row(f"seen users, {EXAMPLES} choices", "seen users"),
        row(f"new users, {EXAMPLES} choices shuffled between them", "shuffled"),
        row("new users, population DPO", "population over base"), "",
        f"| {EXAMPLES} choices | win rate over population DPO | of single users |", "|---|---|---|",
        row("new users", "new users over population"), row("seen users", "seen users over population"), "",
        f"| mix of two users with opposed tastes: weight of the first | {' | '.join(map(str, MIX))} |",
        "|---|" + "---|" * len(MIX),
        *(f"| how much the first of {name} likes it | {' | '.join(f'{one:.3f}' for one in means)} |"
          for name, means in out["mix"].items()),
        f"| mean | {' | '.join(f'{one:.3f}' for one in np.mean([*out['mix'].values()], axis=0))} |", "",
        "| identified among the new users from four choices | share |", "|---|---|",
        *("| top {} | {:.1%} [{:.1%}, {:.1%}] |".format(n, *out[f"identification, top {n}"]) for n in (1, 5)), "",
        f"The branch has {out['parameters']:,} parameters. Sampling took {out['time'][0]:.2f} s of one core without a "
        f"user and {out['time'][1]:.2f} s with one ({out['time'][1] / out['time'][0] - 1:+.1%}).", "",
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "personal.md", "\n".join(lines))
    points = {"win rate": [(float(count), out[f"new users, {count}"][0]) for count in COUNTS]}
    curves = {"new users, by number of choices": points}
    curves["mix of two users"] = {name: list(zip(MIX, means, strict=True)) for name, means in out["mix"].items()}
    write_text(options.work / "curves.html", html.charts(curves))
    print((options.out / "personal.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
