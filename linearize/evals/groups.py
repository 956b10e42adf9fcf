"""Names for several probes: `linearize evaluate DIR --probes recall`, `evaluation: {probes: [recall]}` in a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

GROUPS: dict[str, tuple[str, ...]] = {
    "recall": ("facts", "passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "mqar"),
    "long": ("variable_tracking", "common_words", "frequent_words", "selective_copying", "grammar", "babilong"),
}
"""Group -> its probes: finding things again, and what takes the whole context or several steps."""


def ungrouped(probes: Iterable[Any]) -> list[Any]:
    """`probes` with each name of a group replaced by those of its probes; a probe that comes twice is asked once."""
    found: list[Any] = []
    for probe in probes:
        members = GROUPS.get(probe, ()) if isinstance(probe, str) else ()
        found += [member for member in members or [probe] if member not in found]
    return found
