"""One writer at a time: where one run writes, a second is refused while the first lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from t2i_align.errors import UserError

LOCK = ".writing_lock"


@contextmanager
def only_writer(output: Path, *, file: bool = False, first: bool = True) -> Iterator[None]:
    """Hold a folder, which is made if need be; the system lets go of it however this process ends.

    Args:
        file: `output` is a file, which is held by a lock beside it.
        first: of several processes that write together, this one holds it for all.

    Raises:
        UserError: another run holds it.
    """
    if not first:
        yield
        return
    lock = output.with_name(f".{output.name}.lock") if file else output / LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise UserError(f"{output}: another run is writing there; wait for it, or choose another output") from None
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile finds it gone, and is refused
