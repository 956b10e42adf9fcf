"""How a stage names parameters: by shell-style patterns of full names, or by groups that mean the same everywhere.

Its `train`, `lrs` and `unfreeze` take both, in every architecture.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from linearize.errors import UserError, close_to
from linearize.families.base import Family

GROUPS = ("all", "mixer", "attention", "projections", "q", "k", "v", "o")
"""Names of groups in every family."""
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


def select(model: nn.Module, patterns: list[str], stage: str) -> dict[str, nn.Parameter]:
    """The parameters whose full name matches one of the shell-style `patterns`.

    Raises:
        UserError: when a pattern matches nothing.
    """
    named = dict(model.named_parameters())
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        chosen.update({name: named[name] for name in _matching(pattern, list(named), f"stage {stage}: train")})
    return chosen


def _matching(pattern: str, names: list[str], where: str) -> list[str]:
    """Those of the names of parameters that a pattern matches; a UserError where there is none."""
    if hits := fnmatch.filter(names, pattern):
        return hits
    close = close_to(pattern, GROUPS) if pattern.isalpha() else []  # not of *.mixer.*, which is a pattern
    guess = f"; did you mean {close[0]!r}?" if close else ";"
    raise UserError(
        f"{where} pattern {pattern!r} matches nothing that trains{guess} names look like {', '.join(names[:3])}; "
        f"groups are {', '.join(GROUPS[:-1])} and {GROUPS[-1]}"
    )


def last_match(values: Mapping[str, float], name: str, otherwise: float) -> float:
    """The value of the last pattern that matches the parameter `name`, as the model without adapters calls it."""
    found = [value for pattern, value in values.items() if fnmatch.fnmatchcase(own_name(name), pattern)]
    return found[-1] if found else otherwise


def starts(config: Any, name: str) -> float:
    """Share of a stage's steps after which the parameter `name` begins to train, by `unfreeze`."""
    return last_match(config.unfreeze, name, 0.0)


def check_patterns(config: Any, names: Iterable[str]) -> None:
    """Raise a UserError for a pattern of a stage's settings that matches none of the `names` that train, and where
    nothing trains from the start.
    """
    own = [own_name(name) for name in names]
    if not own:
        raise UserError(f"stage {config.type} trains nothing; remove it, or name parameters that it can train")
    for key in (field for field in FIELDS if hasattr(config, field)):
        for pattern in getattr(config, key):
            _matching(pattern, own, f"stage {config.type}: {key}")
    if (first := min(starts(config, name) for name in own)) > 0:
        raise UserError(
            f"stage {config.type}: unfreeze lets nothing train before {first:g} of the steps; leave a pattern out, or "
            f"train what is to wait in a later stage; what trains looks like {', '.join(own[:3])}"
        )
