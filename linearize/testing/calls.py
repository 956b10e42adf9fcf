"""Small mixers, random inputs and calls of a mixer, for the rules and for tests of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from linearize.mixers.base import Context, HeadShape, Mixer, State

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, HIDDEN = 4, 2, 8, 6, 12

Tensors = list[torch.Tensor]


def bare_mixer(cls: type[Mixer], config: Any, kv_heads: int = KV_HEADS) -> Mixer:
    """A mixer for four query heads whose parameters hold nothing yet."""
    try:
        return cls(config, HeadShape(HEADS, kv_heads, KEY_DIM, VALUE_DIM, HIDDEN, scale=0.4))
    except ValueError:  # a few need keys and values of one size; `run` pads the values for them
        return cls(config, HeadShape(HEADS, kv_heads, KEY_DIM, KEY_DIM, HIDDEN, scale=0.4))


def new_mixer(cls: type[Mixer], config: Any, *, kv_heads: int = KV_HEADS, dtype: torch.dtype = torch.float32) -> Mixer:
    """A small mixer, initialised and then moved away from its symmetric first values; the same on every call."""
    mixer = bare_mixer(cls, config, kv_heads)
    mixer.initialise("mixer", seed=0)
    noise = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
    return mixer.to(dtype)


def inputs(B: int, T: int, *, kv_heads: int = KV_HEADS, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """q [B, T, Hq, K], k [B, T, Hkv, K], v [B, T, Hkv, V], x [B, T, C]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(HEADS, KEY_DIM), (kv_heads, KEY_DIM), (kv_heads, VALUE_DIM), (HIDDEN,)]
    return [torch.randn(B, T, *size, generator=generator).to(dtype) for size in sizes]


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, T, H, K] at positions [B or 1, T], angles in float64 whatever the dtype of x."""
    half = x.shape[-1] // 2
    angles = positions.double()[..., None, None] * 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def run(
    mixer: Mixer,
    given: Tensors,
    state: State | None = None,
    *,
    start: int = 0,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """One call of the mixer on tokens whose positions are given or count from `start`."""
    where = start + torch.arange(given[0].shape[1])[None] if positions is None else positions

    def rotary(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate(q, where), rotate(k, where)

    q, k, v, x = given
    v = torch.nn.functional.pad(v, (0, mixer.shape.value_dim - v.shape[-1]))
    return mixer(q, k, v, x, Context(rotary, mask, documents), state)


def run_pieces(mixer: Mixer, given: Tensors, lengths: list[int]) -> tuple[torch.Tensor, State]:
    """The same tokens in pieces, each with the state of the last."""
    outputs, state, start = [], None, 0
    for length in lengths:
        y, state = run(mixer, [x[:, start : start + length] for x in given], state, start=start)
        outputs.append(y)
        start += length
    assert state is not None and start == given[0].shape[1]
    return torch.cat(outputs, dim=1), state


def nbytes(state: State) -> int:
    """Bytes of all tensors of a state."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state))


def expand_rows(x: torch.Tensor, like: torch.Tensor, groups: int) -> torch.Tensor:
    """A parameter of a mixer with grouped heads, in the shape it has with as many key heads as query heads: what is
    `groups` times as large holds the key heads one after the other, and each is repeated in place.
    """
    for dim, (mine, wanted) in enumerate(zip(x.shape, like.shape, strict=True)):
        if mine != wanted:
            heads = like.shape[dim] * KV_HEADS // mine
            assert wanted == groups * mine and heads == HEADS, f"cannot expand {list(x.shape)} to {list(like.shape)}"
            x = x.unflatten(dim, (KV_HEADS, -1)).repeat_interleave(groups, dim=dim).flatten(dim, dim + 1)
    return x
