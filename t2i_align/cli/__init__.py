"""The command line: each sub-command calls one function of the library, which is imported only then."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C, SIGTERM or SIGHUP."""
    from t2i_align.utils.signals import interrupted_by_signals

    try:
        with interrupted_by_signals():
            return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\ninterrupted before it began", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    from t2i_align.cli.commands import GROUPS
    from t2i_align.cli.parser import app

    # Before torch is imported: beside other work, threads of OpenMP that spin while they wait take others' time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not arguments or (len(arguments) == 1 and arguments[0] in GROUPS):
        arguments.append("--help")
    try:
        app(arguments, prog_name="t2i-align")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
