"""Names for what stands side by side: short ones, that say what differs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def tails(paths: Iterable[Path]) -> dict[Path, str]:
    """The last part of each path; where that is the same for two, as many parts as tell all apart."""
    whole = {path: path.resolve().parts for path in paths}
    depth = 1
    while len({parts[-depth:] for parts in whole.values()}) < len(set(whole.values())):
        depth += 1
    return {path: "/".join(parts[-depth:]) for path, parts in whole.items()}


def distinct(named: Sequence[tuple[str, Path | None]]) -> list[str]:
    """A name for each (name, its file): with the file's behind it where others have the same name, and where even the
    file is the same, a number.
    """
    names = [name for name, _ in named]
    files = tails([path.with_suffix("") for name, path in named if path is not None and names.count(name) > 1])
    found: list[str] = []
    for name, path in named:
        if path is not None and names.count(name) > 1:
            name = f"{name} ({files[path.with_suffix('')]})"
        found.append(_free(name, found))
    return found


def _free(name: str, taken: Sequence[str]) -> str:
    """`name`, numbered when it is taken."""
    numbered = (f"{name} {number}" if number > 1 else name for number in range(1, len(taken) + 2))
    return next(one for one in numbered if one not in taken)
