"""What a mixer is, in the field's words: `gdn` with other parts may be no Gated DeltaNet any more.

`architecture(plan.mixer)` is the mixer's key where its parts are those that it ships with, and otherwise says what it
is made of: "delta rule on hedgehog features beside a softmax window of 64 tokens".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from linearize.errors import UserError
from linearize.registry import find_class


def architecture(mixer: Mapping[str, Any]) -> str:
    """What a mixer is.

    Args:
        mixer: `type` and all its settings, as in `linearize.plan.Plan.mixer`.
    """
    key, shipped = mixer["type"], _defaults(mixer["type"])
    anew = key == "composed" or any(_part(mixer, kind) != _part(shipped, kind) for kind in ("update", "decay"))
    found = _recurrence(_part(mixer, "update"), _part(mixer, "decay")) if anew else key
    features, window = _part(mixer, "feature_map"), mixer.get("window")
    if features and features != ("identity" if anew else _part(shipped, "feature_map")):
        found += f" on {features} features"
    if window and (anew or not shipped.get("window")):
        return f"{found} beside a softmax window of {window:,} tokens"
    return f"{found} without a window" if shipped.get("window") and not window else found


def _recurrence(update: str, decay: str) -> str:
    recurrence, forgetting = _class("mixers.parts.updates", update), _class("mixers.parts.decays", decay)
    title = getattr(recurrence, "title", "") or f"update {update}"
    if forgetting is None or not getattr(recurrence, "titled_without_decay", False):
        return title
    return str(forgetting.title).format(title)


def _class(package: str, key: str) -> Any:
    """The class; None for none, and for one of somebody's own that this program has not imported."""
    try:
        return find_class(package, key, trusted=False) if key else None
    except UserError:
        return None


def _part(settings: Mapping[str, Any], kind: str) -> str:
    """The name of a part; "" for a mixer without it."""
    value = settings.get(kind)
    return str(value.get("type", "")) if isinstance(value, Mapping) else str(value or "")


def _defaults(key: str) -> dict[str, Any]:
    """What a mixer has without settings; nothing for one that needs some."""
    try:
        return dataclasses.asdict(_class("mixers", key).Config())
    except (AttributeError, TypeError):
        return {}
