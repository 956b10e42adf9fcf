"""Which mixers vLLM can run, and what its kernels compute, on this package's operators."""

from __future__ import annotations

from typing import Any

import torch
from pico import small_mixer

from linearize import registry
from linearize.hf.auto import find_class
from linearize.mixers.base import Mixer, config_from_dict
from linearize.ops.conv import causal_conv
from linearize.ops.delta import delta_rule
from linearize.ops.simple_gla import simple_gla
from linearize.serving.vllm.paged import Rows

KERNEL = {
    "composed": "ssd",
    "gdn": "gated_delta_rule",
    "kda": "kda",
    "lightning": "ssd",
    "mamba2": "ssd",
    "retnet": "ssd",
    "supra": "ssd",
}
"""Every mixer that ships and vLLM can run, with the kernel."""


def settings_of(key: str, **settings: Any) -> Any:
    described = {name: value for name, value in small_mixer(key).items() if name != "type"}
    cls = registry.find("mixers", key, Mixer)
    return cls, config_from_dict(cls.Config, {**described, **settings}, find_class)


class TorchKernels:
    """What `paged.Kernels` says, request by request, on this package's operators."""

    def conv(self, x: torch.Tensor, taps: torch.Tensor, silu: bool, pool: torch.Tensor, rows: Rows) -> torch.Tensor:
        def one(r: int, own: slice, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return causal_conv(x[None, own], taps, state=before)

        y = each(one, pool, rows)[0]
        return torch.nn.functional.silu(y) if silu else y

    def delta(self, q: Any, k: Any, v: Any, g: Any, beta: Any, scale: float, pool: Any, rows: Rows) -> torch.Tensor:
        assert q.shape == k.shape and q.shape[:3] == v.shape[:3] == g.shape[:3] == beta.shape

        def one(r: int, own: slice, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = (t[:, own] for t in (q, k, v, g, beta))
            y, after = delta_rule(*tokens, scale=scale, state=before.transpose(-1, -2))
            return y, after.transpose(-1, -2)

        return each(one, pool, rows)

    def ssd(self, q: Any, k: Any, v: Any, dt: Any, rate: Any, pool: Any, rows: Rows) -> torch.Tensor:
        assert q.shape == k.shape and q.shape[:3] == v.shape[:3] == dt.shape and dt.shape[2:] == rate.shape

        def one(r: int, own: slice, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            written = v[:, own] * dt[:, own, :, None]
            state = before.transpose(-1, -2)
            y, after = simple_gla(q[:, own], k[:, own], written, dt[:, own] * rate, scale=1.0, state=state)
            return y, after.transpose(-1, -2)

        return each(one, pool, rows)


def each(one: Any, pool: torch.Tensor, rows: Rows) -> torch.Tensor:
    """What `one` (request, its tokens, its state) makes of all requests; the pool gets the states after."""
    outputs, starts = [], rows.starts.tolist()
    for r, slot in enumerate(rows.slots.tolist()):
        fresh = rows.resumed is not None and not rows.resumed[r]
        assert rows.resumed is not None or starts[r + 1] - starts[r] == 1
        before = torch.zeros_like(pool[slot : slot + 1]) if fresh else pool[slot : slot + 1].clone()
        y, pool[slot] = one(r, slice(starts[r], starts[r + 1]), before)
        outputs.append(y)
    return torch.cat(outputs, dim=1)
