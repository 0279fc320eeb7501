"""The command line: each sub-command calls one function of the library, which is imported only then."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2i_align.cli.commands import Command

# System errors whose message says it all; a traceback adds nothing.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    from t2i_align.cli.commands import GROUPS
    from t2i_align.cli.parser import app

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (len(arguments) == 1 and arguments[0] in GROUPS):
        arguments.append("--help")
    try:
        app(arguments, prog_name="t2i-align")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run(command: Command, options: dict[str, Any], *, debug: bool = False) -> int:
    """Call a command's function with the options that were given; returns the exit status."""
    try:
        if isinstance(options.get("scorers"), list):
            options["scorers"] = [spec for listed in options["scorers"] for spec in listed.split(",") if spec]
        if command.check:  # a wrong key is answered before torch is imported
            load(command.check)(options["config"], options.get("overrides", ()))
        function = load(command.function)
        if command.silent:
            from t2i_align.utils.logging import silence_libraries

            silence_libraries()
        command.print_report(function(**options), options)
        return 0
    except KeyboardInterrupt as interrupt:
        after = f": {interrupt}" if str(interrupt) else "."
        print(f"\ninterrupted{after}\n{command.interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `t2i-align objectives | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        expected = is_user_error(error)
        if debug or not expected:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2 if expected else 1


def load(path: str) -> Any:
    """The function at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone tells a user what to do: bad input, or a system error such as a full disk."""
    # Looked up, not imported: whichever module raised one of these is loaded.
    for module, name in (
        ("t2i_align.errors", "UserError"),
        ("pipelines.base", "PipelineError"),
        ("reward_scorers.errors", "ScorerError"),
    ):
        if isinstance(error, getattr(sys.modules.get(module), name, ())):
            return True
    return isinstance(error, OSError) and error.errno in SYSTEM_ERRORS
