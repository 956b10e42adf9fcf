"""Turn a pretrained Hugging Face causal LM into a linear-attention or hybrid model.

Importing the package is cheap: neither torch nor transformers is loaded before a public name is used. Once
imported, `AutoModelForCausalLM.from_pretrained` loads converted checkpoints without `trust_remote_code`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from linearize.hf import hook

if TYPE_CHECKING:
    from linearize.evals.evaluate import evaluate
    from linearize.hf.load import load
    from linearize.hub.push import push
    from linearize.pipeline import convert
    from linearize.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "convert", "evaluate", "load", "push"]

_HOMES = {
    "Recipe": "linearize.recipe",
    "convert": "linearize.pipeline",
    "evaluate": "linearize.evals.evaluate",
    "load": "linearize.hf.load",
    "push": "linearize.hub.push",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


hook.install()
