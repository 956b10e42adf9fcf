"""How far long work is: bars in a terminal and in notebooks; elsewhere, as in a log file, a line every `EVERY` seconds.

Work that knows its steps counts them itself: `with bar("finetune", unit="tok", total=n) as shown: shown.update(k)`. A
measurement is counted from afar: inside of `with progress("losses", 65_536): ...` what reads text or asks questions
calls `advance(tokens)` behind every batch and need not know of the bar; without one nothing happens. Of several
processes the main one tells.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from tqdm.auto import tqdm

from linearize.training.processes import is_main

EVERY = 60.0
"""Seconds between two lines where there is no terminal."""


class Shown(Protocol):
    """What counts, as a bar of tqdm does."""

    def update(self, n: int) -> object:
        """Count `n` more."""

    def set_postfix(self, *, refresh: bool, **values: str) -> object:
        """What the end of the next line says."""


_bar: ContextVar[Shown | None] = ContextVar("bar", default=None)


@contextmanager
def bar(
    name: str, *, unit: str, total: int | None = None, initial: int = 0, leave: bool = True, anywhere: bool = False
) -> Iterator[Shown]:
    """Inside the context a bar of that name, or lines, tell how far the work is.

    Args:
        unit: of what is counted.
        total: how much there is, if that is known.
        initial: how much was done before.
        leave: say how it ended; else bars go away, and short work leaves no line.
        anywhere: tell it in any process, not in the main one alone.
    """
    here = anywhere or is_main()
    how: dict[str, Any] = {"total": total, "unit": unit, "initial": initial}
    settings: dict[str, Any] = {**how, "desc": name, "unit_scale": unit == "tok", "leave": leave}
    with tqdm(**settings, disable=None if here else True) as drawn:  # None: where there is no terminal
        if not (here and drawn.disable):
            yield drawn
            return
        lines = _Lines(name, leave=leave, **how)
        try:
            yield lines
        finally:
            lines.end()


class _Lines:
    """The words of a bar, each time on a line of its own."""

    def __init__(self, name: str, *, total: int | None, unit: str, initial: int, leave: bool):
        self.how: dict[str, Any] = {"total": total, "unit": unit, "unit_scale": unit == "tok", "initial": initial}
        self.name, self.n, self.leave, self.postfix = name, initial, leave, ""
        self.began = self.told = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.told >= EVERY:
            self._tell()

    def set_postfix(self, *, refresh: bool = True, **values: str) -> None:
        self.postfix = ", ".join(f"{key}={value}" for key, value in values.items())

    def end(self) -> None:
        """The last line."""
        if self.leave or self.told > self.began:
            self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        words = {"n": self.n, "elapsed": self.told - self.began, "prefix": self.name, "postfix": self.postfix}
        print(tqdm.format_meter(**words, **self.how, ncols=0), file=sys.stderr, flush=True)


@contextmanager
def progress(name: str, tokens: int) -> Iterator[None]:
    """Inside the context a bar of that name counts tokens up to about `tokens`; no bar for 0."""
    if not tokens:
        yield
        return
    with bar(name, unit="tok", total=tokens, leave=False) as shown:
        token = _bar.set(shown)
        try:
            yield
        finally:
            _bar.reset(token)


def advance(tokens: int) -> None:
    """Say that so many tokens more were read."""
    if (shown := _bar.get()) is not None:
        shown.update(tokens)


def on_a_terminal() -> bool:
    """Whether bars that others draw, such as the lm-evaluation-harness's, are for a reader."""
    return is_main() and sys.stderr.isatty()
