"""Progress of a measurement in the terminal, as training shows it: `with progress("losses", 65_536): ...`.

What reads text or asks questions calls `advance(tokens)` behind every batch and need not know of the bar; without one
nothing happens. Bars are gone when they are done, and none is drawn where the errors do not go to a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

from linearize.training.processes import is_main

_bar: ContextVar[Any] = ContextVar("bar", default=None)


@contextmanager
def progress(name: str, tokens: int) -> Iterator[None]:
    """Inside the context a bar of that name counts tokens up to about `tokens`; no bar for 0."""
    if not tokens:
        yield
        return
    disable = None if is_main() else True  # None: where there is no terminal
    with tqdm(desc=name, total=tokens, unit="tok", unit_scale=True, leave=False, disable=disable) as bar:
        token = _bar.set(bar)
        try:
            yield
        finally:
            _bar.reset(token)


def advance(tokens: int) -> None:
    """Say that so many tokens more were read."""
    if (bar := _bar.get()) is not None:
        bar.update(tokens)


def on_a_terminal() -> bool:
    """Whether bars that others draw, such as the lm-evaluation-harness's, are for a reader."""
    return is_main() and sys.stderr.isatty()
