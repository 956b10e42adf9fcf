"""Errors meant for the person who runs the toolkit, and the sentences they are made of.

Raise `UserError` when the remedy is in the user's hands: the command line prints only its message. Build
messages for misspelt names with `did_you_mean`, and wrap code that writes large files in `disk_full`.
"""

from __future__ import annotations

import difflib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake the user can fix; the command line prints the message alone and exits with code 2."""


MANY = 40
"""Options that are too many to be listed where one is close to what was written."""


def close_to(value: str, options: Iterable[str]) -> list[str]:
    """Up to five of the options that are written like `value`, the closest first."""
    folded = {name.lower(): name for name in options}
    return [folded[name] for name in difflib.get_close_matches(str(value).lower(), folded, n=5, cutoff=0.6)]


def did_you_mean(value: str, options: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the closest option, if one is close, then all of them, sorted; of more
    than `MANY` options those that are close, if any is.

    >>> "unknown mixer 'gated_deltnet'" + did_you_mean("gated_deltnet", ["lolcats", "gated_deltanet"])
    "unknown mixer 'gated_deltnet'; did you mean 'gated_deltanet'? known: gated_deltanet, lolcats"
    """
    names = sorted(options)
    close = close_to(value, names)
    guess = f"did you mean {close[0]!r}? " if close else ""
    if len(names) > MANY and close:
        others = f"also close: {', '.join(close[1:])}; " if close[1:] else ""
        return f"; {guess}{others}{len(names)} are known"
    return f"; {guess}known: {', '.join(names) or 'none'}"


@contextmanager
def disk_full(folder: str | Path, safe: str = "files written earlier are complete") -> Iterator[None]:
    """Turn "no space left" (or a quota) while writing below `folder` into a `UserError`; all else passes.

    `safe` tells the user what has survived, for example "the checkpoint of step 400 is complete". Recognises
    `OSError`, exceptions it caused, and those of Rust libraries (safetensors), which carry it as text.
    """
    try:
        yield
    except Exception as error:  # a filter: everything that is not about space is re-raised as it came
        if not _is_disk_full(error):
            raise
        free = shutil.disk_usage(_existing(Path(folder))).free
        raise UserError(
            f"no space left while writing to {folder} ({free:,} bytes free there); {safe}. "
            "Free some space or choose another folder, then run the same command again"
        ) from error


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left on device" in text or "os error 28" in text or "Disk quota exceeded" in text:
        return True
    return error.__cause__ is not None and _is_disk_full(error.__cause__)


def _existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path.cwd())


def local_path(text: str | Path) -> Path:
    """The path that a text names, `~` expanded, whether anything is there or not.

    Raises:
        UserError: for what can be no path here: a name that is too long, a user that is not known, a closed folder.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise UserError(f"{_start(str(text))!r} can be no path: {why}") from error
    return path


def _start(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def check_target(path: str | Path) -> None:
    """Raise a UserError, before any work, if no file can be written at `path`; folders are made."""
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be written; give another name")
    path = local_path(path)
    local_path(_partial(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; give another place") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written, for lack of permission; give another place")


def is_partial(path: Path) -> bool:
    """Whether a file is what `write_whole` has not finished."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial(path: Path) -> Path:
    return path.parent / f".{path.name}.partial"


def write_whole(path: str | Path, text: str) -> None:
    """Write a file as UTF-8, all of it or nothing: what stood there stays until the new one is complete."""
    path = Path(path).expanduser()
    partial = _partial(path)
    with disk_full(path.parent):
        partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
