"""The commands about data: `data inspect`, `data split` and `synthesize`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from t2i_align import cli
from t2i_align.errors import unknown


def data(argv: list[str]) -> int:
    """`t2i-align data inspect|split ...`."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ACTIONS:
        return ACTIONS[name](rest)
    if not name.startswith("-"):
        raise unknown("action of data", name, ACTIONS)
    parser = cli._parser("data")
    parser.add_argument("action", choices=ACTIONS, help="each has its own --help")
    parser.parse_args([name])
    raise AssertionError("unreachable: without an action, argparse prints its help or an error and exits")


def _inspect(argv: list[str]) -> int:
    parser = _source_parser("inspect", "Counts, sizes, ties, duplicates, users, prompt lengths and disagreement.")
    parser.add_argument("--out", required=True, help="HTML file to write")
    parser.add_argument("--annotations", nargs="+", default=(), help="files that add to the source, such as scores")
    parser.add_argument("--model", help="whose text encoders' limits prompts are held against")
    parser.add_argument(
        "--images", type=int, default=2000, help="groups whose images are opened (default: %(default)s)"
    )
    parser.add_argument("--examples", type=int, default=12, help="groups that are shown (default: %(default)s)")
    options = cli._parse(parser, argv)
    from t2i_align.data.inspect import inspect

    print(inspect(**cli._keywords(options)).summary())
    print(f"report in {options.out}")
    return 0


def _split(argv: list[str]) -> int:
    parser = _source_parser("split", "Two source files, train.yaml and held_out.yaml, and the held-out prompts.")
    parser.add_argument("--out", required=True, help="folder to write them to")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of prompts or users (default: %(default)s)")
    parser.add_argument("--by", nargs="+", choices=("prompt", "user"), default=["prompt"], help="(default: prompt)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    options = cli._parse(parser, argv)
    from t2i_align.data.spec import split

    for name, count in split(**cli._keywords(options)).items():
        print(f"{name.replace('_', ' '):<18} {count}")
    return 0


ACTIONS: dict[str, Callable[[list[str]], int]] = {"inspect": _inspect, "split": _split}


def synthesize(argv: list[str]) -> int:
    """`t2i-align synthesize ...`."""
    parser = cli._parser("synthesize")
    parser.add_argument("prompts", help="text file with one prompt per line, or testbed:dev")
    parser.add_argument("--models", nargs="+", required=True, help="models, training runs or LoRAs, or testbed:sd")
    parser.add_argument("--scorers", nargs="+", required=True, help="scorers, also as one list with commas")
    parser.add_argument("--out", required=True, help="folder for images, scores and groups.jsonl")
    parser.add_argument("--per-prompt", type=int, default=4, help="images by each model (default: %(default)s)")
    parser.add_argument("--pairs", choices=("best_worst", "all"), help="pairs (default: groups of all candidates)")
    parser.add_argument("--agree", type=float, default=0.0, help="share of scorers that must prefer the better one")
    cli._drawing(parser)
    options = cli._keywords(cli._parse(parser, argv))
    options["scorers"] = [spec for listed in options["scorers"] for spec in listed.split(",") if spec]
    from t2i_align.labeling.synthesize import synthesize as make
    from t2i_align.utils.logging import silence_libraries

    silence_libraries()
    summary = make(**options)
    if summary.missing:
        print(f"{summary.missing} prompts are left to other processes; the last one to finish writes {summary.out}")
    else:
        print(f"{summary.groups} groups in {summary.out}, {summary.skipped} skipped")
    return 0


def _source_parser(action: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"t2i-align data {action}", description=description, allow_abbrev=False)
    parser.add_argument("source", help="preference data: file, folder, source file, hub:owner/name, or testbed:pairs")
    parser.add_argument("--format", default="auto", help="of the source (default: as it looks)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
