"""Longer positions: what a model's configuration has to say so that its rotary embedding serves longer sequences.

`extended(config, family, length, policy)` gives the changes, `extend(model, family, changes)` makes them in a loaded
model, which then is what its exported configuration says, in transformers too. The rotary embedding is one part of a
model, so the changes hold for all layers that rotate: those that keep softmax, and mixers that rotate in their windows
or states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from linearize.errors import UserError
from linearize.families.base import Family
from linearize.registry import known_family

Policy = Literal["keep", "yarn", "linear", "theta"]
FULL = "full_attention"
"""The kind of layers whose positions change where kinds have their own; those with sliding windows see near tokens."""


def may_end(config: Any) -> int | None:
    """How many positions a model of this configuration has at least; None where they go on, as rotary ones do.

    Of an architecture without a family `learned` looks whether there are more.
    """
    family = known_family(config)
    rotary = family is not None and family.rotary is not None
    return None if rotary else getattr(config.get_text_config(), "max_position_embeddings", None)


def learned(model: Any) -> int | None:
    """How many positions a model has that learned a table of them and has none beyond; None where positions go on, as
    rotary ones do.
    """
    if (limit := may_end(model.config)) is None:
        return None
    words = getattr(model, "get_input_embeddings", lambda: None)()
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words)
    return limit if any(limit <= rows <= limit + 2 for rows in tables) else None  # OPT's begins two rows later


def untaught(config: Any, lengths: Iterable[int]) -> list[str]:
    """What the plan says of training on rows of these lengths, in tokens, where some are beyond the positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    beyond = sorted({length for length in lengths if limit is not None and length > limit})
    if not beyond:
        return []
    return [
        f"training rows of {', '.join(f'{n:,}' for n in beyond)} tokens are longer than the {limit:,} positions that "
        f"the source model was trained for, and it may teach nonsense beyond; seq_len up to {limit:,} keeps to them"
    ]


def extended(
    config: Any, family: type[Family], length: int, policy: Policy, theta: float | None = None
) -> dict[str, Any]:
    """New values of the text configuration for sequences of `length` tokens.

    Args:
        config: of the model.
        family: its family.
        length: tokens.
        policy: keep leaves the rotary embedding; linear divides positions by the factor of growth (Chen et al. 2023,
            arXiv:2306.15595); yarn does so by frequency, and sharpens attention (Peng et al. 2023, arXiv:2309.00071);
            theta sets another base (Xiong et al. 2023, arXiv:2309.16039). A model that yarn or linear scaled before is
            scaled further, from its first length.
        theta: the base, for that policy.

    Raises:
        UserError: for positions that this model does not have, that it scales already in a way that does not fit, or
            that its configuration, written and read again, would not say.
    """
    text = config.get_text_config()
    known: int = text.max_position_embeddings
    changes: dict[str, Any] = {"max_position_embeddings": length} if length > known else {}
    if family.rotary is None:
        if policy != "keep" or changes:
            raise UserError(
                f"a {text.model_type} model has no rotary embedding, but one of {known:,} learned positions; take "
                f"seq_len up to {known:,} and positions: keep"
            )
        return {}
    parameters: dict[str, Any] = copy.deepcopy(text.rope_parameters)
    rope = parameters[FULL] if isinstance(parameters.get(FULL), Mapping) else parameters
    kind = rope["rope_type"]
    if kind in ("dynamic", "longrope") and (changes or policy != "keep"):
        raise UserError(
            f"this model's positions grow with the length by themselves (rope_type {kind}), for {known:,} tokens; take "
            f"seq_len up to {known:,} and positions: keep"
        )
    if policy == "keep":
        return changes
    if policy == "theta":
        rope["rope_theta"] = theta
        return _told(text, {**changes, "rope_parameters": parameters})
    if kind not in ("default", policy):
        raise UserError(
            f"positions: {policy} cannot be put on what this model has already, rope_type {kind}; use keep or theta"
        )
    if not changes:
        raise UserError(
            f"positions: {policy} is for more tokens than the {known:,} that this model has positions for, and seq_len "
            f"is {length:,}; use positions: keep"
        )
    first = known if kind == "default" else rope.get("original_max_position_embeddings", known / rope.get("factor", 1))
    rope |= {"rope_type": policy, "factor": length / first}
    if policy == "yarn":
        rope["original_max_position_embeddings"] = first
    return _told(text, {**changes, "rope_parameters": parameters})


def extend(model: Any, family: type[Family], changes: Mapping[str, Any]) -> None:
    """Put `extended` changes into the configuration of a loaded model, and make its rotary embedding anew from it."""
    if not changes:
        return
    _assign(model.config.get_text_config(), changes)
    body = family.base_model(model)
    for name, module in list(body.named_modules()):
        if hasattr(module, "rope_type") and hasattr(module, "config"):
            parent, _, leaf = name.rpartition(".")
            fresh = type(module)(module.config).to(next(module.buffers()).device)
            setattr(body.get_submodule(parent), leaf, fresh.train(module.training))


def _told(text: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The same changes, if a configuration that is written and read with them has them."""
    changed = copy.deepcopy(text)
    _assign(changed, changes)
    try:
        read = type(text).from_dict(changed.to_dict())
        kept = all(getattr(read, key) == value for key, value in changes.items())
    except (KeyError, ValueError):  # such as Phi-3's, which takes yarn for its own longrope
        kept = False
    if not kept:
        raise UserError(
            f"a {text.model_type} configuration cannot say {changes['rope_parameters']}; use positions: keep or theta"
        )
    return changes


def _assign(config: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        setattr(config, key, copy.deepcopy(value))
