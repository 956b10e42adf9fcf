"""Names for several probes: `linearize evaluate DIR --probes recall`, `evaluation: {probes: [recall]}` in a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

GROUPS: dict[str, tuple[str, ...]] = {
    "recall": ("facts", "passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "mqar"),
    "long": ("variable_tracking", "common_words", "frequent_words", "selective_copying", "grammar", "babilong"),
}
"""Group -> its probes: finding things again, and what takes the whole context or several steps."""


def ungrouped(probes: Iterable[Any]) -> list[Any]:
    """`probes` with each group, a name or its `type` and settings, replaced by its probes with those settings; a probe
    that comes twice is asked once.
    """
    found: list[Any] = []
    for probe in probes:
        key = probe.get("type") if isinstance(probe, Mapping) else probe
        members: list[Any] = [probe]
        if isinstance(key, str) and key in GROUPS:
            names = GROUPS[key]
            members = list(names) if isinstance(probe, str) else [{**probe, "type": name} for name in names]
        found += [member for member in members if member not in found]
    return found
