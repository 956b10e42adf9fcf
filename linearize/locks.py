"""One process at a time for a place on disk: `with held(path, "... is in use; ..."): ...`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from linearize.errors import UserError


@contextmanager
def held(path: Path, in_use: str, *, remove: bool = False) -> Iterator[None]:
    """Hold the lock file at `path`, in a folder that is there, inside the context; a killed process lets go by itself.

    Args:
        path: the lock file, made where it is missing.
        in_use: what to say where another process holds it.
        remove: leave no lock file behind.

    Raises:
        UserError: when another process holds it, or no file can be made there.
    """
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path.parent} cannot be written, for lack of permission; give another place")
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(in_use) from error
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error}; give another place") from error
    try:
        yield
    finally:
        if remove:
            with suppress(OSError):  # of systems that keep what is open
                path.unlink(missing_ok=True)
        lock.release()
