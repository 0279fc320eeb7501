"""The standard streams of a command: no text steers the terminal, and a reader that left does not end the work."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from t2i_align.errors import printable

# Progress bars return to the line's start or go a line up, and libraries colour their messages.
HARMLESS = re.compile(r"(\r|\x1b\[\d*A|\x1b\[[\d;]*m)")


class Stream:
    """A text stream. Names and prompts may hold escape sequences: these are written as text."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        parts = HARMLESS.split(text)  # every second one is harmless
        parts[::2] = map(printable, parts[::2])
        self._unless_left(self.stream.write, "".join(parts))
        return len(text)

    def flush(self) -> None:
        self._unless_left(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _unless_left(self, action: Callable[..., Any], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # `| head`, a closed terminal: what follows is dropped
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def safe_streams(stdout: TextIO | None, stderr: TextIO | None) -> Iterator[None]:
    """Print through `Stream` inside the block; a stream that does not exist (None) stays like that."""
    with ExitStack() as streams:
        for redirect, stream in ((redirect_stdout, stdout), (redirect_stderr, stderr)):
            if stream is not None:
                streams.enter_context(redirect(Stream(stream)))
        yield
