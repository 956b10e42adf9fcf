"""The local branch: exact softmax attention over the last tokens, the first ones as sinks, and learned meta tokens.

Sinks are StreamingLLM's (Xiao et al. 2023, arXiv:2309.17453). Meta tokens are keys and values that belong to no
position and that every query sees, as in Lizard (arXiv:2507.09025); they start so far below every score that they have
no weight to speak of. A source that caps its logits has them capped here as well, with meta tokens' products of query
and key; their biases are added afterwards, as a mask is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize.inits.base import Constant, Init, Normal
from linearize.mixers.base import Context, HeadShape
from linearize.mixers.parts.base import Part
from linearize.mixers.parts.combines.base import Window
from linearize.ops.window import capped, window_attention


class LocalWindow(Part):
    """See the module docstring. State: the ring of the last tokens' keys and values, and the sinks."""

    def __init__(self, window: int, sinks: int, meta_tokens: int, shape: HeadShape):
        super().__init__()
        self.window, self.sinks, self.shape = window, sinks, shape
        self.meta_tokens = meta_tokens
        if meta_tokens:
            self.meta_k = nn.Parameter(torch.empty(shape.heads, meta_tokens, shape.key_dim))
            self.meta_v = nn.Parameter(torch.empty(shape.heads, meta_tokens, shape.value_dim))
            self.meta_bias = nn.Parameter(torch.empty(shape.heads, meta_tokens))

    def inits(self) -> dict[str, Init]:
        every = {"meta_k": Normal(0.02), "meta_v": Constant(0.0), "meta_bias": Constant(-4.0)}
        return every if self.meta_tokens else {}

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ctx: Context,
        state: Any,
        bare_q: torch.Tensor,
        bare: bool = False,
    ) -> tuple[Window, Any]:
        """q, k as the softmax sees them, v [B, T, Hkv, V'], V' >= V where it carries more; bare_q has no positions.
        `bare` leaves the meta tokens' values out, not their weights.
        """
        out, lse, peak, after = window_attention(
            q,
            k,
            v,
            window=self.window,
            sinks=self.sinks,
            scale=self.shape.scale,
            softcap=self.shape.softcap,
            mask=ctx.mask,
            documents=ctx.documents,
            state=state,
            return_max=True,
        )
        if not self.meta_tokens:
            return Window(out, lse, peak), after
        dtype = lse.dtype
        scores = torch.einsum("bthk,hmk->bthm", bare_q.to(dtype), self.meta_k.to(dtype)) * self.shape.scale
        scores = capped(scores, self.shape.softcap) + self.meta_bias.to(dtype)
        whole = torch.logaddexp(lse, scores.logsumexp(-1))
        out = out.to(dtype) * (lse - whole).exp().unsqueeze(-1)
        if not bare:
            meta = torch.einsum("bthm,hmv->bthv", (scores - whole.unsqueeze(-1)).exp(), self.meta_v.to(dtype))
            out = out + F.pad(meta, (0, out.shape[-1] - meta.shape[-1]))
        return Window(out.to(v.dtype), whole, torch.maximum(peak, scores.amax(-1))), after
