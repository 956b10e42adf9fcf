"""Stopping a training loop between two steps, so that nothing it has done is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


@contextmanager
def between_steps() -> Iterator[Callable[[], BaseException | None]]:
    """Inside the context Ctrl-C and SIGTERM wait for the end of a step; again, they stop at once.

    Yields:
        What to raise, asked after each step: None as long as nobody wants to stop, then a `KeyboardInterrupt`, or for
        SIGTERM, which clusters send before they take a machine back, a `SystemExit` with the shell's code 143.
        Outside of the main thread, which alone receives signals, nothing changes.
    """
    wanted: list[BaseException] = []

    def on_signal(number: int, frame: Any) -> None:
        stop = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if wanted:
            raise stop
        wanted.append(stop)
        tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: wanted[0] if wanted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
