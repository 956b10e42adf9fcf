"""What mixers with a softmax window share about its settings; the window itself is `linearize.ops.window`."""

from __future__ import annotations


def check_window(mixer: str, window: int, sinks: int) -> None:
    """Refuse sizes that no window has.

    Raises:
        ValueError: naming the mixer, for a window under one token or a negative number of sinks.
    """
    if window < 1:
        raise ValueError(f"{mixer}: window must be at least 1 token, got {window}")
    if sinks < 0:
        raise ValueError(f"{mixer}: sinks must be 0 or more tokens, got {sinks}")
