"""Checks a mixer against the contract of `linearize.mixers.base`, whether it is of this package or of your own.

    from linearize.testing import check_mixer
    check_mixer("my_mixers:Decay", {"first_decay": 0.9})

It runs on a CPU in a second or two, in float64, so that rounding hides no mistake. Parameters are moved away from their
first values, since a gate that starts at zero would hide what it gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from linearize.mixers.base import Mixer, config_from_dict
from linearize.registry import find_class
from linearize.testing.calls import KV_HEADS, bare_mixer, new_mixer
from linearize.testing.rules import RULES

__all__ = ["check_mixer"]


def check_mixer(mixer: str | type[Mixer], settings: Mapping[str, Any] | None = None) -> None:
    """Run every rule of the contract on small random inputs.

    Args:
        mixer: a class, `module:Class`, or the key of a shipped mixer.
        settings: its settings as a recipe writes them; windows must be shorter than 80 tokens to be left.

    Raises:
        AssertionError: names the first rule that is broken, with the numbers that show it. Other exceptions are the
            mixer's own, with a note that says which rule was being checked.
    """
    cls: Any = find_class("mixers", mixer) if isinstance(mixer, str) else mixer
    label = mixer if isinstance(mixer, str) else f"{mixer.__module__}:{mixer.__qualname__}"
    config = config_from_dict(cls.Config, dict(settings or {}), find_class)

    def make(kv_heads: int = KV_HEADS, *, filled: bool = True) -> Mixer:
        if filled:
            return new_mixer(cls, config, kv_heads=kv_heads, dtype=torch.float64)
        return bare_mixer(cls, config, kv_heads)

    for rule in RULES:
        name = (rule.__doc__ or "").strip().rstrip(".")
        try:
            rule(make)
        except AssertionError as error:
            raise AssertionError(f"{label} breaks a rule: {name}. {error}") from error
        except Exception as error:
            error.add_note(f"while checking {label}: {name}")
            raise
