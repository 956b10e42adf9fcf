"""How a converted model is laid out in vLLM: states, names of weights, shards of mixers, configuration. No vLLM needed.

Tensor parallelism gives each of `size` processes as many heads, with the key and value heads that they read. vLLM's own
modules (projections, MLP, embeddings) shard themselves; `shard` is for the mixers.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from linearize.errors import UserError
from linearize.mixers.base import HeadShape, Mixer, build_mixer
from linearize.natives.base import conversion
from linearize.registry import family_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the sources whose classes in vLLM have been looked into."""
STACKED: dict[str, tuple[str, str | int]] = {
    "self_attn.q_proj": ("self_attn.qkv_proj", "q"),
    "self_attn.k_proj": ("self_attn.qkv_proj", "k"),
    "self_attn.v_proj": ("self_attn.qkv_proj", "v"),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}
"""Modules that vLLM has as a part of another: which, and what it calls the part."""

Shapes = tuple[tuple[int, ...], ...]
Spec = tuple[type[Mixer], Any]


class Place(NamedTuple):
    """Where vLLM holds a tensor of a checkpoint."""

    parameter: str
    """Name of the parameter."""
    part: str | int | None
    """What vLLM calls the part of it; None for all of it."""


def place(name: str) -> Place:
    """Where vLLM holds the checkpoint's tensor `name`. Mixers, norms, embeddings keep their names."""
    for module, (stacked, part) in STACKED.items():
        if f".{module}." in name:
            return Place(name.replace(module, stacked), part)
    return Place(name, None)


def local_shape(shape: HeadShape, size: int) -> HeadShape:
    """What one of `size` processes has of a layer.

    Raises:
        UserError: where heads cannot be dealt out evenly.
    """
    if shape.heads % size or shape.kv_heads % size:
        raise UserError(
            f"tensor_parallel_size {size} does not divide {shape.heads} query and {shape.kv_heads} key heads, and "
            "mixers hold no copies of key heads; take a size that divides both"
        )
    return dataclasses.replace(shape, heads=shape.heads // size, kv_heads=shape.kv_heads // size)


def full_mixer(spec: Spec, shape: HeadShape) -> Any:
    """A mixer without values, on the meta device."""
    with torch.device("meta"):
        return build_mixer(*spec, shape)


def states(config: Any, size: int = 1) -> dict[int, Shapes]:
    """Layer -> shapes of what one of `size` processes keeps of a request in it.

    First, if the mixer has a convolution, its last tokens [taps - 1, channels], with the channels of the queries, keys
    and values that it takes one after the other; then the recurrent state [heads, V, features].
    """
    family = family_of(config)
    found: dict[int, Shapes] = {}
    for layer, spec in enumerate(conversion(config).layers):
        if spec is None:
            continue
        shape = local_shape(family.shape(config, layer), size)
        mixer = full_mixer(spec, shape)
        recurrent = (shape.heads, shape.value_dim, mixer.map_k.features)
        if mixer.conv is None:
            found[layer] = (recurrent,)
            continue
        taps = list(mixer.conv.taps.parameters())
        found[layer] = ((taps[0].shape[-1] - 1, sum(tap[..., 0].numel() for tap in taps)), recurrent)
    return found


def state_dtypes(shapes: Shapes, model: torch.dtype) -> tuple[torch.dtype, ...]:
    """Types of states of these shapes: the convolution's tokens have the model's, the recurrent state is float32."""
    return (model,) * (len(shapes) - 1) + (torch.float32,)


def shard(whole: torch.Tensor, local: torch.Size | tuple[int, ...], rank: int) -> torch.Tensor:
    """Process `rank`'s part, of shape `local`, of a mixer's tensor: all of it, or a share of the one dimension that is
    smaller there, which counts heads.

    Raises:
        UserError: where shapes do not fit together.
    """
    differ = [dim for dim, (a, b) in enumerate(zip(whole.shape, local, strict=False)) if a != b]
    if not differ and whole.dim() == len(local):
        return whole
    if whole.dim() != len(local) or len(differ) != 1 or whole.shape[differ[0]] % local[differ[0]]:
        raise UserError(
            f"a tensor of shape {list(whole.shape)} in the checkpoint does not give parts of shape {list(local)}; the "
            "configuration is not that of these weights"
        )
    (dim,) = differ
    return whole.narrow(dim, rank * local[dim], local[dim])


def adapt(config: Any) -> None:
    """Say in the converted model's configuration, in place, what vLLM asks of one with recurrent layers.

    `layer_types` tells which layers have a state. Qwen2's class refuses layers of more than one type unless
    `max_window_layers` rules sliding windows out.
    """
    kinds = ("full_attention", "linear_attention")
    config.layer_types = [kinds[spec is not None] for spec in conversion(config).layers]
    if hasattr(config, "max_window_layers"):
        config.max_window_layers = config.num_hidden_layers


def chunks(starts: list[int], size: int) -> tuple[list[int], list[int], list[int]]:
    """Requests' tokens in chunks of at most `size`, none of which spans two requests.

    Args:
        starts: where requests begin, and at last where the last one ends.
        size: tokens.

    Returns:
        Where chunks begin, and at last where the last one ends; the last chunk of each request; each chunk's request.
    """
    ends, last, row = [0], [], []
    for request, (start, end) in enumerate(pairwise(starts)):
        for begin in range(start, end, size):
            ends.append(min(begin + size, end))
            row.append(request)
        last.append(len(row) - 1)
    return ends, last, row
