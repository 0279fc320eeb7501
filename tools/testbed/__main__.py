"""`python -m tools.testbed COMMAND`: make and judge the bundled models and preference pairs."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

from t2i_align.errors import UserError
from t2i_align.utils.logging import silence_libraries

# Each is the module of its name, or of its name without "-video", which has `options(parser, video)` and `run(args)`.
COMMANDS = {
    "pretrain": "train a tiny base model from nothing",
    "clip": "train a tiny CLIP from nothing, for scorers",
    "pretrain-video": "train the tiny base model for clips from nothing",
    "distill": "make the other image bases from the v base",
    "pairs": "sample a base and write labelled preference pairs",
    "pairs-video": "sample the base for clips and write preference pairs",
    "evaluate": "judge a base's samples by the oracle",
}


def main(argv: list[str] | None = None) -> None:
    """Run one command; its module is imported only then."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:14} {summary}" for name, summary in COMMANDS.items())
        print(f"usage: python -m tools.testbed COMMAND [options]\n\n{listing}\n\nCOMMAND --help lists its options.")
        return
    command, *rest = argv
    if command not in COMMANDS:
        raise SystemExit(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
    silence_libraries()
    module, video = importlib.import_module(f"tools.testbed.{command.removesuffix('-video')}"), "-video" in command
    parser = argparse.ArgumentParser(prog=f"python -m tools.testbed {command}", description=module.__doc__)
    module.options(parser, video)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(video=video, out=None, force=False)
    args = parser.parse_intermixed_args(rest)
    if args.out and args.out.exists() and not args.force:
        raise SystemExit(f"{args.out} exists; pass --force to replace it")
    torch.set_num_threads(args.threads)
    try:
        module.run(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
