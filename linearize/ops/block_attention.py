"""Softmax attention inside blocks of tokens, linear attention over all before them, and a bank between the two.

A query sees by softmax its own block up to itself, `back` whole blocks before it and, with a `bank`, the most salient
ones among all earlier tokens; the sum over phi(k) v^T holds the others. Tokens go over at the end of a block, so each
earlier token is in exactly one place. All blocks of a call are computed in parallel; only the choice of the bank, which
needs nothing but scores, goes through them in order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from linearize.ops.bank import ABSENT, attention_received, choose
from linearize.ops.blocks import Blocks
from linearize.ops.documents import fill_padding, repack, unpack
from linearize.ops.layout import carry, check_inputs, expand_heads, working_dtype, zero_padding
from linearize.ops.window import attend

State = dict[str, torch.Tensor]


class Read(NamedTuple):
    """What the queries read, in the working precision: float32, float64 for float64 inputs."""

    out: torch.Tensor
    """`[B, T, Hq, V]` of the softmax."""
    lse: torch.Tensor
    """`[B, T, Hq]` logarithm of the sum of its weights."""
    peak: torch.Tensor
    """`[B, T, Hq]` its largest score."""
    num: torch.Tensor
    """`[B, T, Hq, V]` sum of phi(q).phi(k) v over the tokens outside the softmax."""
    den: torch.Tensor
    """`[B, T, Hq]` sum of their weights."""


@dataclass(frozen=True)
class _Rows:
    """The operator on rows that hold one document each. Tokens are kept as [k, v, linear k], by kv head while they are
    in blocks and by query head in the bank."""

    block: int
    back: int
    bank: int
    scale: float
    softcap: float | None
    k_dim: int
    v_dim: int
    features: Callable[[torch.Tensor], torch.Tensor]

    def start(self, kept: torch.Tensor, phi_q: torch.Tensor, dtype: torch.dtype) -> State:
        """The state before any token, for kept `[B, T, Hkv, D]` and phi_q `[B, T, Hq, F]`."""
        B, heads, span = len(kept), phi_q.shape[2], (self.back + 1) * self.block
        state = {
            "local": kept.new_zeros(B, span, *kept.shape[2:]),
            "seen": torch.zeros(B, dtype=torch.int64, device=kept.device),
            "S": kept.new_zeros(B, heads, phi_q.shape[3], self.v_dim, dtype=dtype),
            "z": kept.new_zeros(B, heads, phi_q.shape[3], dtype=dtype),
        }
        if self.bank:
            state["received"] = kept.new_zeros(B, span, heads, dtype=torch.float64)
            state["bank"] = kept.new_zeros(B, self.bank, heads, kept.shape[3])
            state["score"] = torch.full((B, self.bank, heads), ABSENT, device=kept.device)
        return state

    def run(
        self, q: torch.Tensor, kept: torch.Tensor, phi_q: torch.Tensor, present: torch.Tensor, *, state: State | None
    ) -> tuple[Read, State]:
        """q `[B, T, Hq, K]`, kept `[B, T, Hkv, D]`, phi_q `[B, T, Hq, F]`, present `[B, T]`, not 0 for real tokens."""
        dtype = working_dtype(q, kept, phi_q)
        past = self.start(kept, phi_q, dtype) if state is None else state
        count = (present > 0).sum(1)
        blocks = Blocks(self.block, self.back, q.shape[1], past["seen"], count, fresh=state is None)
        local = blocks.columns(kept, past["local"])
        after = {"local": blocks.ring(local), "seen": past["seen"] + count}
        tokens = expand_heads(local, q.shape[2]).to(dtype).transpose(1, 2)  # [B, H, columns, D]
        exists, ages = blocks.bands(blocks.exists()), blocks.ages()[:, None]
        # A query always sees itself: padding, whose k and v are zero, then gets a finite softmax.
        visible = (ages >= 0) & exists[:, :, None] | (ages == 0)  # [B, N, c, span]
        queries = blocks.queries(q.to(dtype) * self.scale).transpose(2, 3)  # [B, N, H, c, K]
        seen = self.k_dim + self.v_dim
        band = blocks.bands(tokens[..., :seen], dim=2).transpose(-1, -2).transpose(1, 2)  # [B, N, H, span, K + V]
        if self.bank:
            held, gone, leaves, bank_after = self._select(queries, band, tokens, exists, blocks, past)
            after |= bank_after
            band = torch.cat([band, held[..., :seen].transpose(1, 2)], dim=3)
            filled = torch.arange(self.bank, device=q.device) >= self.bank - blocks.before()[..., None]
            visible = torch.cat([visible, filled[:, :, None].expand(-1, -1, visible.shape[2], -1)], dim=-1)
        else:
            gone, leaves = tokens[:, :, : blocks.number * self.block], blocks.exists()[:, : blocks.number * self.block]
            gone = gone.unflatten(2, (blocks.number, self.block))
            leaves = (leaves.unflatten(1, (blocks.number, self.block)) & blocks.full()[..., None])[:, None]
        keys, values = band[..., : self.k_dim].mT, band[..., self.k_dim :]
        out, lse, peak = attend(queries, keys, values, visible, None, softcap=self.softcap)
        num, den, sums = self._linear(blocks.queries(phi_q.to(dtype)).transpose(2, 3), gone, leaves, past)
        read = Read(*(blocks.outputs(x.transpose(2, 3)) for x in (out, lse, peak, num, den)))
        return read, after | sums

    def _select(
        self,
        queries: torch.Tensor,
        band: torch.Tensor,
        tokens: torch.Tensor,
        exists: torch.Tensor,
        blocks: Blocks,
        past: State,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]:
        """The bank `[B, H, N, bank, D]` that each block sees, who is dropped at its end `[B, H, N, block, D]` and which
        of those exist, and the bank's part of the state."""
        received = blocks.carried(past["received"])
        keys = band[..., : self.k_dim]
        received = received + attention_received(queries, keys, exists, blocks, softcap=self.softcap)
        scores = torch.where(blocks.exists()[..., None], received.float(), ABSENT)
        scores = torch.cat([past["score"], scores], dim=1).transpose(1, 2)
        banks, gone, leaves = choose(scores, blocks, self.bank)
        everything = torch.cat([past["bank"].to(tokens.dtype).transpose(1, 2), tokens], dim=2)
        last = banks[:, :, -1]
        after = {
            "received": blocks.ring(received),
            "bank": _take(everything, last).to(past["bank"].dtype).transpose(1, 2),
            "score": scores.gather(-1, last).transpose(1, 2),
        }
        return _take(everything, banks[:, :, :-1]), _take(everything, gone), leaves, after

    def _linear(
        self, phi_q: torch.Tensor, gone: torch.Tensor, leaves: torch.Tensor, past: State
    ) -> tuple[torch.Tensor, torch.Tensor, State]:
        """num `[B, N, H, c, V]` and den `[B, N, H, c]` over what was dropped before each block, and the state."""
        k = gone[..., -self.k_dim :] if gone.shape[-1] > self.k_dim + self.v_dim else gone[..., : self.k_dim]
        phi_k = self.features(k.flatten(2, 3).transpose(1, 2)).to(phi_q.dtype)
        phi_k = phi_k.transpose(1, 2).unflatten(2, gone.shape[2:4]) * leaves[..., None]
        v = gone[..., self.k_dim : self.k_dim + self.v_dim]
        v_one = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        sums = torch.cat([past["S"], past["z"].unsqueeze(-1)], dim=-1)
        before, sums = carry(phi_k.transpose(-1, -2) @ v_one, None, sums)
        read = phi_q @ before.transpose(1, 2)
        return read[..., :-1], read[..., -1], {"S": sums[..., :-1], "z": sums[..., -1]}


def _take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tokens `[B, H, L, D]` at index `[B, H, ...]`: `[B, H, ..., D]`."""
    flat = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1])
    return tokens.gather(2, flat).unflatten(2, index.shape[2:])


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    features: Callable[[torch.Tensor], torch.Tensor],
    *,
    block: int,
    back: int = 0,
    bank: int = 0,
    scale: float,
    softcap: float | None = None,
    linear_k: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
) -> tuple[Read, State]:
    """The two branches over disjoint sets of tokens; see the module docstring.

    q `[B, T, Hq, K]`, k `[B, T, Hkv, K]` and v `[B, T, Hkv, V]` as the softmax sees them, scale multiplies q . k and
    softcap bounds the products, those of the saliency too (`linearize.ops.window.capped`; None: no bound); phi_q
    `[B, T, Hq, F]` the queries' features; `features` maps keys `[B, L, Hq, K]` to theirs `[B, L, Hq, F]`, those of
    linear_k `[B, T, Hkv, K]` if given, else of k. block and bank in tokens, back in blocks; a bank needs back = 1
    and is chosen for each query head by saliency (`linearize.ops.bank`), without a gradient through the choice. mask
    `[B, T]` bool, real tokens first in each row; documents `[B, T]` int, non-decreasing, blocks count from the start of
    each; state as returned.

    Returns a `Read` and the state, of a size that depends on no length: local `[B, (back + 1) block, Hkv, D]` the
    blocks in reach, seen `[B]` int64, S `[B, Hq, F, V]` and z `[B, Hq, F]`; with a bank also the saliency so far of
    the tokens in local, received, and bank `[B, bank, Hq, D]` with its score. With documents it is that of the row's
    last document. Padding changes no state; what is read at padding is finite and carries no meaning.
    Raises ValueError for shapes that do not fit, impossible sizes, a softcap that is not positive, or documents with a
    state.
    """
    check_inputs("block_attention", q, k, v, mask=mask, documents=documents, state=state)
    if block < 1 or back < 0 or bank < 0 or (bank and back != 1):
        raise ValueError(
            "block_attention: block must be at least 1 token, back and bank at least 0, and a bank needs back=1, got "
            f"block={block}, back={back}, bank={bank}"
        )
    with torch.autocast(q.device.type, enabled=False):
        kept = torch.cat([k, v] if linear_k is None else [k, v, linear_k], dim=-1)
        rows = _Rows(block, back, bank, scale, softcap, k.shape[-1], v.shape[-1], features)
        present = torch.ones_like(q[..., 0, 0]) if mask is None else mask.to(q.dtype)
        inputs = [q, zero_padding(kept, mask), phi_q, present]
        if documents is None:
            return rows.run(*inputs, state=state)
        parts, layout = unpack(inputs, fill_padding(documents, mask))
        results: list[Any] = [rows.run(*part, state=None) for part in parts]  # type: ignore[arg-type]
        return repack(results, layout)
