"""Personal preferences (PPD) on the testbed: people with opposed tastes, new people from a few of their choices.

    python benchmarks/personal.py --work runs/personal     # writes benchmarks/results/personal.md

Captions of the pairs state neither size, background nor place, and the two images of a pair are both correct: they
differ in what people have tastes about. A user likes a light or a dark background, big or small shapes, and things on
the left or on the right: eight tastes in opposed pairs, with deviations of each user's own. Stages, kept in --work:

- clip: `python -m tools.testbed clip`, which has seen captions and no preference, as the embedder;
- pairs: choices of the users in training, and of new ones;
- runs: with each training seed, Diffusion-DPO with a personal branch and, on the same pairs, as a LoRA for all;
- served: images for each user, judged by that user: with 1 to 16 choices, with choices shuffled between users, for
  users seen in training, of the base and of the LoRA for all; mixes of two users; identification;
- time: of sampling without and with a user, of SD and SD3.

Training times are drawn from high noise (`geometric`), where a background and sizes are decided.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from preference_models import open_pairs, statements, write_pairs
from torch import Tensor

from t2i_align import align
from t2i_align.conditioning import personal
from t2i_align.conditioning.config import PersonalConfig
from t2i_align.conditioning.preferences import build_embedder, describe, rebuilt
from t2i_align.data import readers
from t2i_align.data.schema import Group
from t2i_align.data.users import choices_by_user
from t2i_align.evaluation.personal import crossed_interval, identification, liked, win_rate
from t2i_align.inference.generate import sample_seed
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_adapter
from t2i_align.inference.users import tokens_of
from t2i_align.testbed.captions import write
from t2i_align.testbed.oracle import Oracle, Verdict
from t2i_align.utils import html
from t2i_align.utils.files import atomic_file, write_json, write_text
from tools.testbed.annotators import TRAITS, Annotator

RESULTS = Path(__file__).parent / "results"
AXES: tuple[dict[str, float], ...] = ({"white": 0.7, "black": -0.7}, {"big": 0.9}, {"left": 0.4})  # a taste's signs
SPREAD = 0.1  # standard deviation between users of a taste
NEW = 1000  # the first new user
EXAMPLES, COUNTS = 4, (1, 4, 16)
MIX = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS = 4  # of opposed users, whose mixes are made
TIMED, ROUNDS = ("testbed:sd", "testbed:sd3"), 7
MARGIN = 0.02  # of scores that are a tie, as the annotators have it
SAMPLING = {"guidance": 1.0, "batch_size": 16}
Array = NDArray[np.float64]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/personal"), help="where stages are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--model", default="testbed:sd", help="base model")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP (default: one is trained)")
    parser.add_argument("--users", type=int, default=52, help="users in training")
    parser.add_argument("--new-users", type=int, default=12, help="users who are not")
    parser.add_argument("--pairs", type=int, default=10, help="choices of each user in training")
    parser.add_argument("--prompts", type=int, default=12, help="test prompts, of which each user gets an image")
    parser.add_argument("--sampling-steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1, help="of training")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--population-lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=20.0)
    parser.add_argument("--table", action="store_true", help="write the table of what is there and run nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.clip = options.clip or options.work / "clip"
    stages: list[Callable[[argparse.Namespace], None]] = [clip_stage, pairs_stage]
    for seed in range(options.seeds):
        stages += [partial(stage, seed=seed) for stage in (ppd_stage, served_stage, population_stage)]
    for stage in [table] if options.table else [*stages, time_stage, table]:
        start = time.monotonic()
        stage(options)
        print(f"{getattr(stage, 'func', stage).__name__}: {time.monotonic() - start:.0f} s", flush=True)
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


def clip_stage(options: argparse.Namespace) -> None:
    if not options.clip.exists():
        command = [sys.executable, "-m", "tools.testbed", "clip", "--out", str(options.clip)]
        subprocess.run([*command, "--look", "200", "--steps", "60", "--batch", "24"], check=True)


def pairs_stage(options: argparse.Namespace) -> None:
    """Choices of the users 0 … in training, and of new ones after them."""
    for name, first, count, each in (("seen", 0, options.users, options.pairs),
                                     ("new", NEW, options.new_users, COUNTS[-1])):  # fmt: skip
        file = options.work / f"{name}.parquet"
        if not file.exists():
            users = [number for number in range(first, first + count) for _ in range(each)]
            drawn = open_pairs("train", len(users), np.random.default_rng((19, first)))
            write_pairs(file, drawn, [person(number) for number in users], [str(number) for number in users])


def trained(options: argparse.Namespace, name: str, seed: int, rate: float, **more: Any) -> Path:
    """Diffusion-DPO on the pairs of the users in training; a run that was stopped continues."""
    output = options.work / f"{name}-{seed}"
    if (output / ("personal" if "personal" in more else "lora")).exists():
        return output
    align({
        "output_dir": str(output), "resume": True,
        "model": {"path": options.model}, "data": {"path": str(options.work / "seen.parquet")},
        "objective": {"name": "diffusion_dpo", "beta": options.beta},
        "optim": {"lr": rate, "schedule": "cosine", "warmup_steps": 10},
        "train": {"steps": options.steps, "batch_size": options.batch, "seed": seed, "timestep_sampling": "geometric"},
        "log": {"every": 10, "checkpoint_every": 20, "keep_checkpoints": 1}, **more,
    })  # fmt: skip
    return output


class Gallery:
    """The oracle's verdicts of the images made for users, which any user can judge."""

    def __init__(self, options: argparse.Namespace, pipeline: Any, prompts: list[str], seeds: list[int]) -> None:
        self.pipeline, self.prompts, self.seeds = pipeline, prompts, seeds
        self.sampling = {**SAMPLING, "steps": options.sampling_steps}

    def __call__(self, users: dict[str, Any]) -> dict[str, Verdict]:
        """Of images for users by their tokens, None for nobody."""
        seen: dict[str, Verdict] = {}

        def judge(user: str, pixels: Tensor, prompts: Sequence[str]) -> Array:
            seen[user] = Oracle().judge(pixels, prompts)
            return seen[user].reward

        liked(self.pipeline, users, self.prompts, self.seeds, judge, **self.sampling)
        return seen


def judged(seen: dict[str, Verdict], judges: Sequence[str]) -> Array:
    """How much users like images, [judges, made for, prompts]."""
    return np.array([[person(int(judge)).score(verdict) for verdict in seen.values()] for judge in judges])


def kept(folder: Path, name: str, make: Callable[[], Array]) -> Array:
    """A result that is made once."""
    file = folder / f"{name}.npy"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        with atomic_file(file) as temporary, open(temporary, "wb") as stream:
            np.save(stream, make())
    return np.asarray(np.load(file))


@torch.no_grad()
def served_stage(options: argparse.Namespace, seed: int) -> None:
    """What users think of the images that the branch makes for them."""
    folder, (prompts, seeds, new, seen) = options.work / f"served-{seed}", tests(options)
    pipeline, rng = load_pipeline(options.model, device="cpu"), np.random.default_rng(29)
    made = Gallery(options, pipeline, prompts, seeds)
    kept(options.work, "base", lambda: judged(made({"": None}), [*new]))
    kept(options.work, "base seen", lambda: judged(made({"": None}), [*seen]))
    with adapter_on(pipeline, resolve_adapter(options.work / f"ppd-{seed}")):
        branch: personal.Personal = pipeline.denoiser.personal
        embedder = rebuilt(branch.embedding)

        def tokens(choices: dict[str, list[Group]], count: int, start: int = 0) -> dict[str, Tensor]:
            return {
                user: tokens_of(branch, embedder, all[start : start + count], user) for user, all in choices.items()
            }

        def serve(name: str, choices: dict[str, list[Group]], count: int) -> Array:
            likes = kept(folder, name, lambda: judged(made(tokens(choices, count)), [*choices]))
            base = np.load(options.work / f"base{' seen' * (name == 'seen')}.npy")[:, 0]
            print(f"{name}: {win_rate(base, own(likes), margin=MARGIN)}", flush=True)
            return likes

        few = serve(f"new {EXAMPLES}", new, EXAMPLES)
        serve("shuffled", shuffled(new, rng), EXAMPLES)
        names, few_tokens = [*new], tokens(new, EXAMPLES)

        def mixed(first: str, other: str) -> Array:
            parts = {str(w): w * few_tokens[first] + (1 - w) * few_tokens[other] for w in MIX[1:-1]}
            a, b = names.index(first), names.index(other)
            inner = judged(made(parts), [first, other])
            all = np.concatenate([few[[a, b]][:, [b]], inner, few[[a, b]][:, [a]]], axis=1)
            return np.asarray(all[0] - all[1])

        opposed = [(one, next(two for two in names if int(two) % 8 == 7 - int(one) % 8)) for one in names[:PAIRS]]
        kept(folder, "mix", lambda: np.stack([mixed(*pair) for pair in opposed]))
        parts = [tokens(new, EXAMPLES, start) for start in range(0, COUNTS[-1], EXAMPLES)]
        users = [torch.stack([part[user] for part in parts]) for user in new]
        for top in (1, 5):
            share, bounds = identification(users, top)
            kept(folder, f"top {top}", partial(np.array, (share, *bounds)))
        serve("seen", seen, EXAMPLES)
        for count in COUNTS:
            serve(f"new {count}", new, count)


def own(likes: Array) -> Array:
    """How much each user likes the images made for them, [users, prompts], of [judges, made for, prompts]."""
    return np.einsum("uup->up", likes)


def ppd_stage(options: argparse.Namespace, seed: int) -> None:
    """The personal branch alone."""
    embedder = {"embedder": f"hf-clip:{options.clip}", "examples": [1, 8], "dropout": 0.05}
    trained(options, "ppd", seed, options.lr, lora=None, personal=embedder)


def population_stage(options: argparse.Namespace, seed: int) -> None:
    """A LoRA for all, at the rate of the quickstart's."""
    lora = {"rank": 16, "alpha": 16.0, "targets": "all"}
    run = trained(options, "population", seed, options.population_lr, lora=lora)
    prompts, seeds, new, seen = tests(options)
    pipeline = load_pipeline(options.model, device="cpu")
    with adapter_on(pipeline, resolve_adapter(run)):
        made = Gallery(options, pipeline, prompts, seeds)
        for name, users in (("new", new), ("seen", seen)):
            make = partial(judged, made({"": None}), [*users])
            kept(options.work / f"served-{seed}", f"population {name}", make)


def tests(options: argparse.Namespace) -> tuple[list[str], list[int], dict[str, list[Group]], dict[str, list[Group]]]:
    """Test prompts and their seeds, and the choices of new users and of as many in training."""
    rng = np.random.default_rng(31)
    prompts = [write(one, rng) for one in statements("test", options.prompts, rng, p_size=0.0, p_background=0.0)]
    new, seen = (choices_by_user(readers.read(options.work / f"{name}.parquet"), name) for name in ("new", "seen"))
    seeds = [sample_seed(0, index, 0) for index in range(len(prompts))]
    return prompts, seeds, new, {user: seen[user] for user in [*seen][: len(new)]}


def shuffled(choices: dict[str, list[Group]], rng: np.random.Generator) -> dict[str, list[Group]]:
    """Each user with as many choices as before, of all users at random."""
    everything = [group for own in choices.values() for group in own]
    order = iter(rng.permutation(len(everything)))
    return {user: [everything[next(order)] for _ in own] for user, own in choices.items()}


def time_stage(options: argparse.Namespace) -> None:
    """CPU seconds of sampling for nobody and for a user, in turn."""
    file, prompts = options.work / "time.json", tests(options)[0][:4]
    if file.exists():
        return
    config, out = PersonalConfig(embedder=f"hf-clip:{options.clip}", examples=(1, 8)), {}
    embedding = describe(config, build_embedder(config))
    for name in TIMED:
        pipeline, times = load_pipeline(name, device="cpu"), ([], [])
        branch = personal.install(pipeline, embedding)
        tokens = torch.randn(config.tokens, config.width, generator=torch.Generator().manual_seed(0))
        for _ in range(ROUNDS):
            for own, whose in zip(times, (None, tokens), strict=True):
                branch.off = whose is None
                with personal.serving(pipeline.denoiser, whose, guided=False):
                    start = time.process_time()
                    pipeline.generate(prompts, range(len(prompts)), **SAMPLING, steps=options.sampling_steps)
                    own.append(time.process_time() - start)
        ratios = [with_user / without for without, with_user in zip(*times, strict=True)]
        out[name] = [*map(statistics.median, times), statistics.median(ratios), min(ratios), max(ratios)]
    write_json(file, out)


def table(options: argparse.Namespace) -> None:
    """Write the tables as markdown, and the curves as a page beside it."""

    def pooled(name: str) -> Array:
        return np.stack([np.load(options.work / f"served-{seed}" / f"{name}.npy") for seed in range(options.seeds)])

    def there(name: str) -> bool:
        return all((options.work / f"served-{seed}" / f"{name}.npy").exists() for seed in range(options.seeds))

    def made_for(name: str) -> Array | None:
        """Of each run, how users like the images made for them; None where that is not run."""
        if not there(name):
            return None
        likes = pooled(name)  # [runs, judges, made for, prompts]
        return likes[:, :, 0] if likes.shape[2] == 1 else np.stack([own(one) for one in likes])

    def named(top: int) -> str:
        runs = pooled(f"top {top}") if there(f"top {top}") else []
        return ", ".join("{:.1%} [{:.1%}, {:.1%}]".format(*run) for run in runs) or "not run"

    def row(name: str, before: Array | None, after: Array | None) -> tuple[str, tuple[float, ...]]:
        if before is None or after is None:
            return f"| {name} | not run | | |", ()
        found = win_rate(before, after, margin=MARGIN)
        by_run = ", ".join(f"{win_rate(*pair, margin=MARGIN).rate:.1%}" for pair in zip(before, after, strict=True))
        users = f"{min(found.by_user):.0%} … {max(found.by_user):.0%}"
        return f"| {name} | {found} | {by_run} | {users} |", (found.rate, *found.interval)

    base, base_seen = (np.repeat(np.load(options.work / f"{name}.npy")[None, :, 0], options.seeds, 0)
                       for name in ("base", "base seen"))  # fmt: skip
    by_count = [row(f"new users, {n} choice{'s' * (n > 1)}", base, made_for(f"new {n}")) for n in COUNTS]
    timed = options.work / "time.json"
    mixes = pooled("mix").mean(0) if there("mix") else np.full((2, len(MIX), 2), np.nan)  # [pairs, weights, prompts]
    means = [(float(one.mean()), *crossed_interval(one)) for one in mixes.swapaxes(0, 1)]
    rises = [(float(one.mean()), *crossed_interval(one)) for one in np.diff(mixes, axis=1).swapaxes(0, 1)]
    names = ("users", "new_users", "pairs", "prompts", "sampling_steps", "seeds", "steps", "batch", "lr",
             "population_lr", "beta", "model")  # fmt: skip
    command = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# Personal preferences on the testbed", "", f"`python benchmarks/personal.py {command}`", "",
        f"At commit {commit}. {options.users} users in training, {options.new_users} new, eight tastes; "
        f"{options.prompts} test prompts, {options.seeds} training seeds. Users judge the images made for them, at the "
        "same seeds of sampling. Intervals of 95 % over users and prompts, training seeds averaged.", "",
        "| images for each user, of these choices | win rate over the base | by training seed | of single users |",
        "|---|---|---|---|", *(text for text, _ in by_count),
        row(f"seen users, {EXAMPLES} choices", base_seen, made_for("seen"))[0],
        row(f"new users, {EXAMPLES} choices shuffled between them", base, made_for("shuffled"))[0],
        row("new users, population DPO", base, made_for("population new"))[0], "",
        f"| {EXAMPLES} choices | win rate over population DPO | by training seed | of single users |",
        "|---|---|---|---|",
        row("new users", made_for("population new"), made_for(f"new {EXAMPLES}"))[0],
        row("seen users", made_for("population seen"), made_for("seen"))[0], "",
        f"| mix of two users with opposed tastes: weight of the first | {' | '.join(map(str, MIX))} |",
        "|---|" + "---|" * len(MIX),
        f"| how much more the first likes the image than the second, {len(mixes)} pairs | "
        + " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*one) for one in means) + " |",
        "| rise from the weight before | | "
        + " | ".join("{:+.3f} [{:+.3f}, {:+.3f}]".format(*one) for one in rises) + " |", "",
        f"| identified among the {options.new_users} new users from four choices | by training seed | chance |",
        "|---|---|---|",
        *(f"| top {n} | {named(n)} | {n / options.new_users:.1%} |" for n in (1, 5)), "",
        "| sampling, CPU seconds | without a user | with one | ratio, median and range of rounds |",
        "|---|---|---|---|",
        *("| {} | {:.2f} | {:.2f} | {:.3f} ({:.3f} to {:.3f}) |".format(name, *values)
          for name, values in (json.loads(timed.read_text()) if timed.exists() else {}).items()), "",
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "personal.md", "\n".join(lines))
    curves = {"win rate over the base, new users": {"choices": [
        (float(n), *values) for n, (_, values) in zip(COUNTS, by_count, strict=True) if values]},
        "how much more the first of two users likes a mix": {"weight of the first": [
            (weight, *values) for weight, values in zip(MIX, means, strict=True)]}}  # fmt: skip
    write_text(options.out / "personal.html", html.charts(curves, axis=""))
    print((options.out / "personal.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
