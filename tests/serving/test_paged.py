"""Mixers on slots: many requests in one call, in chunks and one by one, as each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_cases import KERNEL, TorchKernels, settings_of

from linearize.mixers.base import Context
from linearize.serving.vllm.layout import chunks, shard
from linearize.serving.vllm.paged import Rows, Slots, paged
from linearize.testing.calls import HEADS, inputs, new_mixer, rotate, run

every_mixer = pytest.mark.parametrize("key", KERNEL)
STEPS = [
    ({0: (0, 7), 1: (0, 5)}, False),
    ({1: (5, 6), 0: (7, 12), 2: (0, 1)}, False),
    ({0: (12, 13), 1: (6, 7), 2: (1, 2)}, True),
    ({2: (2, 3), 0: (13, 14)}, True),
]
"""What requests 0, 1 and 2 read in each step, from and to, and whether it is a step of decoding."""
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((key, {}) for key in KERNEL),
    ("gdn", {"conv": {"activation": "silu", "inputs": "kv"}, "feature_map": "hedgehog"}),
    ("gdn", {"decay": "none", "conv": {"size": 0}, "rope": "recurrent", "qk_norm": "l2"}),
    ("gdn", {"decay": {"type": "scalar", "write": True}, "kv_heads": "cloned", "skip": True}),
    ("kda", {"decay": "from_k", "update": {"type": "delta", "negative": True}}),
    ("mamba2", {"feature_map": "hedgehog", "conv": {"inputs": "qk"}}),
    ("retnet", {"rope": "features", "output": {"norm": "none", "gate": "none"}}),
]


def rank_of(spec: Any, whole: Any, rank: int, size: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A process's part of the mixer `whole`, and pools of five slots with leavings in them."""
    mixer = paged(spec, whole.shape, rank, size)
    for name, parameter in mixer.named_parameters():
        parameter.data.copy_(shard(whole.get_parameter(name), parameter.shape, rank))
    pools = {"linear": torch.randn(5, mixer.shape.heads, mixer.shape.value_dim, mixer.map_k.features)}
    if mixer.conv is not None:
        taps = list(mixer.conv.taps.parameters())
        pools["conv"] = torch.randn(5, taps[0].shape[-1] - 1, sum(tap[..., 0].numel() for tap in taps))
    return mixer, pools


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("key, settings", VARIANTS, ids=str)
@torch.no_grad()
def test_requests_in_slots_read_what_they_read_alone(key: str, settings: dict[str, Any], size: int) -> None:
    """Prompts in chunks beside others' decoding, by one process or two, against the mixer on each request alone."""
    spec = settings_of(key, **settings)
    whole = new_mixer(*spec)
    requests = [inputs(1, 14, seed=seed) for seed in range(3)]
    alone = [run(whole, given)[0] for given in requests]
    for rank in range(size):
        mixer, pools = rank_of(spec, whole, rank, size)
        mine = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
        keys = slice(rank * mixer.shape.kv_heads, (rank + 1) * mixer.shape.kv_heads)
        for reads, decoding in STEPS:
            lengths, began = [e - b for b, e in reads.values()], [b > 0 for b, _ in reads.values()]
            starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
            rows = Rows(starts, torch.tensor([4 - r for r in reads]), None if decoding else torch.tensor(began))
            q, k, v, x = (torch.cat([requests[r][i][:, b:e] for r, (b, e) in reads.items()], dim=1) for i in range(4))
            v = torch.nn.functional.pad(v, (0, mixer.shape.value_dim - v.shape[-1]))
            where = torch.cat([torch.arange(b, e) for b, e in reads.values()])[None]
            ctx = Context(lambda q, k, where=where: (rotate(q, where), rotate(k, where)))
            given = {name: Slots(pool, rows, TorchKernels()) for name, pool in pools.items()}
            y, _ = mixer(q[:, :, mine], k[:, :, keys], v[:, :, keys], x, ctx, given)
            expected = torch.cat([alone[r][:, b:e, mine] for r, (b, e) in reads.items()], dim=1)
            torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)


@every_mixer
@torch.no_grad()
def test_before_there_are_pools_the_rest_of_the_mixer_runs(key: str) -> None:
    spec = settings_of(key)
    mixer = paged(spec, new_mixer(*spec).shape)
    mixer.initialise("mixer", seed=0)
    q, k, v, x = inputs(1, 5)
    v = torch.nn.functional.pad(v, (0, mixer.shape.value_dim - v.shape[-1]))
    idle = Slots(None, None, TorchKernels())
    y, _ = mixer(q, k, v, x, Context(lambda q, k: (q, k)), {"conv": idle, "linear": idle})
    assert y.shape == (*q.shape[:3], v.shape[-1]) and y.isfinite().all()


def test_chunks_end_where_requests_do() -> None:
    assert chunks([0, 5, 6, 14], 4) == ([0, 4, 5, 6, 10, 14], [1, 2, 4], [0, 0, 1, 2, 2])
    assert chunks([0, 4], 4) == ([0, 4], [0], [0])
