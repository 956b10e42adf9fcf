"""Arguments by name: architectures order those of their forwards differently, and pass some by position."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def positional(function: Any) -> tuple[str, ...]:
    """Names of the arguments that a method takes by position, without self."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self")


def by_name(names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, those given by position under their `names`."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


CACHES = ("cache", "past_key_values", "layer_past")
"""Names of the cache among arguments: since transformers 5.24, before, and in GPT-NeoX before."""


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a call, or None."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)
