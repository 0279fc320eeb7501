"""Progress of long commands: a bar on a terminal and in notebooks, whole lines where the output goes to a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm as plain
from tqdm.auto import tqdm

LINE_EVERY = 30  # seconds


def interactive() -> bool:
    """Whether somebody sees the output as it comes, so that a bar may draw over itself."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def progress_bar(**options: Any) -> plain[Any]:
    """A bar with tqdm's options."""
    return tqdm(**options) if interactive() else Lines(**options)


class Lines(plain):
    """A bar that writes a line now and then, and at its end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"mininterval": LINE_EVERY, "maxinterval": LINE_EVERY, **options})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        print(msg or str(self), file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]  # of tqdm, which its types leave out
