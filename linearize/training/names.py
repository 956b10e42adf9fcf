"""Short names of groups of parameters, which mean the same in every architecture.

A stage's `train`, `lrs` and `unfreeze` take these names beside shell-style patterns of full parameter names.
"""

from __future__ import annotations

from typing import Any

from linearize.families.base import Family

GROUPS = "all, mixer, attention, projections, q, k, v and o"
"""As errors list them."""
FIELDS = ("train", "lrs", "unfreeze")
"""Settings of a stage that name parameters."""


def groups(family: type[Family]) -> dict[str, list[str]]:
    """Name -> patterns of the parameters that it stands for, in models of this family."""
    attention = ".".join(part for part in (family.base, family.attention.format("*")) if part)
    projections = {short: f"{attention}.{module}.*" for short, module in family.lora_targets.items()}
    return {
        "all": ["*"],
        "mixer": ["*.mixer.*"],
        "attention": [f"{attention}.*"],
        "projections": list(dict.fromkeys(projections.values())),
        **{short: [pattern] for short, pattern in projections.items()},
    }


def own_name(name: str) -> str:
    """A parameter's name without what an adapter around its module adds to it: q_proj.base_layer.weight is q_proj's."""
    return name.replace(".base_layer.", ".")


def spelled_out(config: Any, family: type[Family]) -> Any:
    """A stage's settings with patterns in the place of the names of groups; of dicts, the last entry still counts."""
    known = groups(family)
    changed: dict[str, Any] = {}
    for field in (name for name in FIELDS if hasattr(config, name)):
        value = getattr(config, field)
        if isinstance(value, dict):
            entries: dict[str, float] = {}
            for name, number in value.items():
                for pattern in known.get(name, [name]):
                    entries.pop(pattern, None)
                    entries[pattern] = number
            changed[field] = entries
        else:
            changed[field] = [pattern for name in value for pattern in known.get(name, [name])]
    return config.model_copy(update=changed)
