"""SIGINT, SIGTERM and SIGHUP: training finishes its step and saves; every other work ends as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def graceful_shutdown() -> Iterator[threading.Event]:
    """Yield an event that these signals set; a second Ctrl-C raises KeyboardInterrupt.

    The others often come twice, as from `timeout` or a service manager, and one that is ignored (`nohup`) stays so.
    """
    event = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    with _handled(("SIGINT", "SIGTERM", "SIGHUP"), handle):
        yield event


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, once, so that the work cleans up and says how to continue."""
    heard = False

    def handle(number: int, frame: Any) -> None:
        nonlocal heard
        if not heard:
            heard = True
            raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled(("SIGTERM", "SIGHUP"), handle):
        yield


@contextmanager
def _handled(names: Sequence[str], handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle the signals inside the block, but those that are ignored, and none outside the main thread."""
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
    if threading.current_thread() is not threading.main_thread():  # a notebook's worker thread: signals never reach it
        known = []
    heard = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
