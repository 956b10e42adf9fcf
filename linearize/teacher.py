"""Looks at the softmax teacher inside a converted model: what attention is given, its logits, and what comes out.

Attention transfer and calibration both see it through `run_teacher`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from linearize.batch import reordered
from linearize.families.base import Family
from linearize.ops.layout import expand_heads
from linearize.ops.window import capped
from linearize.swap import Call, SwappedAttention, swapped, teacher_path

See = Callable[[str, SwappedAttention, Call, torch.Tensor, torch.Tensor], None]
"""Looks into a layer, see `run_teacher`."""


def teacher_logits(attn: SwappedAttention, call: Call, queries: slice = slice(None)) -> torch.Tensor:
    """The source's softmax logits [B, Hq, T', T] of these queries over all keys, float32, -inf where they see nothing.

    Real tokens come first in a row, as `batch` has them; scale, cap, reach and direction are the source's.
    """
    x, position, _, batch = call
    shape = attn.mixer.shape
    q, k, _ = attn.family.project(attn, x)
    q, k = attn.family.rotate(attn, *attn.family.normed(attn, q, k), position)
    if batch.order is not None:
        q, k = reordered(q, batch.order), reordered(k, batch.order)
    scores = torch.einsum("bihd,bjhd->bhij", q[:, queries].float(), expand_heads(k, q.shape[2]).float()) * shape.scale
    scores = capped(scores, shape.softcap)
    place = torch.arange(x.shape[1], device=x.device)
    age = place[queries, None] - place[None, :]
    seen = torch.ones_like(age, dtype=torch.bool)
    if shape.causal:
        seen = age >= 0
    if shape.reach is not None:
        seen = seen & (age.abs() < shape.reach)
    seen = seen[None]
    if batch.documents is not None:
        seen = seen & (batch.documents[:, queries, None] == batch.documents[:, None, :])
    if batch.mask is not None and not shape.causal:
        seen = seen & (batch.mask[:, None, :] | (age == 0))
    return scores.masked_fill(~seen[:, None], float("-inf"))


def blocks(model: nn.Module, family: type[Family]) -> list[nn.Module]:
    """The decoder layers, in order."""
    layers = family.base_model(model).get_submodule(family.attention.partition(".{}")[0])
    return list(layers.children())


def run_blocks(
    model: nn.Module, family: type[Family], inputs: Mapping[str, torch.Tensor], see: Callable[..., None]
) -> None:
    """Run the model's body, and look at each decoder layer as it passes.

    Args:
        model: a converted model, on the path that its context chose.
        family: its family.
        inputs: what the base model takes.
        see: called with (index, layer, args, kwargs, output) after each layer.
    """
    hooks = []
    for index, block in enumerate(blocks(model, family)):

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, index: int = index) -> None:
            see(index, module, args, kwargs, output)

        hooks.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        family.base_model(model)(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def run_teacher(model: nn.Module, inputs: Mapping[str, torch.Tensor], see: See) -> None:
    """Run the softmax teacher's body, and look into each swapped layer as it passes.

    Args:
        model: a converted model.
        inputs: what the base model takes: input_ids [B, T], and where they apply position_ids and attention_mask.
        see: called with (full name, attention, call, heads [B, T, Hq * V], output [B, T, C]) after each layer's
            attention: what it was given, the teacher's head outputs, and what it returned.
    """
    heads: dict[str, torch.Tensor] = {}
    hooks = []
    layers = swapped(model)
    for name, attn in layers.items():

        def keep(module: nn.Module, args: tuple, name: str = name) -> None:
            heads[name] = args[0]

        def after(attn: Any, args: tuple, kwargs: dict[str, Any], output: Any, name: str = name) -> None:
            see(name, attn, attn.given(args, kwargs), heads.pop(name, output[0]), output[0])
            heads.pop(name, None)  # `see` may have run the projection; what stayed would keep a graph per layer alive

        if (projection := attn.family.output_projection(attn)) is not None:
            hooks.append(projection.register_forward_pre_hook(keep))
        hooks.append(attn.register_forward_hook(after, with_kwargs=True))
    family = next(iter(layers.values())).family
    options = {"use_cache": False} if family.causal else {}
    try:
        with teacher_path(model):
            family.base_model(model)(**inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
