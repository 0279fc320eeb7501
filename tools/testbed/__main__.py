"""`python -m tools.testbed <command>`: pretrain, distill, pairs, evaluate, and the same for clips."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "pretrain": "train a tiny base model from nothing",
    "clip": "train a tiny CLIP from nothing, for scorers",
    "pretrain-video": "train the tiny base model for clips from nothing",
    "distill": "make the epsilon base from the v base",
    "pairs": "sample a base and write labelled preference pairs",
    "pairs-video": "sample the base for clips and write preference pairs",
    "evaluate": "judge a base's samples by the oracle",
}


def main(argv: list[str] | None = None) -> None:
    """Hand the arguments to the sub-command's own `main`; its module is imported only then."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:14} {what}" for name, what in COMMANDS.items())
        print(f"usage: python -m tools.testbed <command> [options]\n\n{listing}\n\n<command> --help lists its options.")
        return
    if argv[0] not in COMMANDS:
        raise SystemExit(f"unknown command {argv[0]!r}; the commands are {', '.join(COMMANDS)}")
    name, _, video = argv[0].partition("-")
    importlib.import_module(f"tools.testbed.{'video.' * bool(video)}{name}").main(argv[1:])


if __name__ == "__main__":
    main()
