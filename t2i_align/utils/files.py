"""One writer at a time: where one run writes, a second is refused while the first lives."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from t2i_align.errors import UserError

LOCK = ".writing_lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems
logger = logging.getLogger(__name__)


@contextmanager
def output_lock(output: Path, *, file: bool = False, first: bool = True) -> Iterator[None]:
    """Hold a folder, which is made if need be; the system lets go of it however this process ends.

    Args:
        file: `output` is a file, which is held by a lock beside it, or beside what it is a link to.
        first: of several processes that write together, this one holds it for all.

    Raises:
        UserError: another run holds it, or there is a file where a folder is needed.
    """
    if not first:
        yield
        return
    real = output.resolve()
    lock = real.with_name(f".{real.name}.lock") if file else real / LOCK
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock).acquire(timeout=0)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{output}: {error.filename} is a file; a folder is needed there") from error
    except Timeout:
        raise UserError(f"{output}: another run is writing there; wait for it, or choose another output") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks, so that nothing keeps a second run from it", output)
        yield
        return
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile finds it gone, and is refused
