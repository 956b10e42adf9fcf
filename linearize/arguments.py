"""Arguments by name: architectures order those of their forwards differently, and pass some by position."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import __version__
from transformers.cache_utils import Cache


def positional(function: Any) -> tuple[str, ...]:
    """Names of the arguments that a method takes by position, without self."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self")


def by_name(names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, those given by position under their `names`."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


CACHES = ("cache", "past_key_values", "layer_past")
"""Names of the cache among arguments: since transformers 5.24, before, and in the layers of GPT-NeoX."""


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a call, or in the output of a model; None where there is none.

    Raises:
        ValueError: for a cache under a name that is not known, or two caches, one of which would not be heeded.
    """
    found = {name: x for name, x in given.items() if x is not None and (name in CACHES or isinstance(x, Cache))}
    if not found:
        return None
    cache = next(iter(found.values()))
    if not any(name in CACHES for name in found) or any(x is not cache for x in found.values()):
        raise ValueError(not_found(f"a cache is given as {' and '.join(found)}"))
    return cache


def not_found(what: str) -> str:
    """The message for a call in which a model would silently forget what came before."""
    return (
        f"{what}; a converted model needs one cache, called {', '.join(CACHES[:-1])} or {CACHES[-1]}, and would forget "
        f"what came before. Transformers {__version__} may be newer than this code of the model: install an older one, "
        "or update linearize (or the checkpoint that carries the code)"
    )


def continued(model: Any, cache: Any, **given: Any) -> Any:
    """Call a model on what comes after the tokens in `cache`, which it goes on to fill; None begins a new one.

    Raises:
        ValueError: where the model's forward takes no cache under a known name.
    """
    return model(**given, **{cache_name(type(model)): cache}, use_cache=True)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def cache_name(model_class: type) -> str:
    """Name of the cache among the arguments of this class's forward."""
    names = positional(model_class.forward)  # type: ignore[attr-defined]
    for name in CACHES:
        if name in names:
            return name
    raise ValueError(not_found(f"{model_class.__name__}.forward takes {', '.join(names)}"))
