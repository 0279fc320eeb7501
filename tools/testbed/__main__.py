"""`python -m tools.testbed COMMAND`: make and judge the bundled models and preference pairs."""

from __future__ import annotations

import importlib
import sys

from t2i_align.utils.logging import silence_libraries

COMMANDS = {  # module and summary; one module serves images and clips
    "pretrain": ("pretrain", "train a tiny base model from nothing"),
    "clip": ("clip", "train a tiny CLIP from nothing, for scorers"),
    "pretrain-video": ("pretrain", "train the tiny base model for clips from nothing"),
    "distill": ("distill", "make the other image bases from the v base"),
    "pairs": ("pairs", "sample a base and write labelled preference pairs"),
    "pairs-video": ("pairs", "sample the base for clips and write preference pairs"),
    "evaluate": ("evaluate", "judge a base's samples by the oracle"),
}


def main(argv: list[str] | None = None) -> None:
    """Hand the arguments to the command's own `main`; its module is imported only then."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:14} {summary}" for name, (_, summary) in COMMANDS.items())
        print(f"usage: python -m tools.testbed COMMAND [options]\n\n{listing}\n\nCOMMAND --help lists its options.")
        return
    command, *rest = argv
    if command not in COMMANDS:
        raise SystemExit(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
    silence_libraries()
    run = importlib.import_module(f"tools.testbed.{COMMANDS[command][0]}").main
    run(rest, command) if "-video" in command else run(rest)


if __name__ == "__main__":
    main()
