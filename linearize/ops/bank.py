"""Which tokens stay exact: the saliency of tokens, and a bank of the most salient ones that have left their blocks.

A token's saliency is the softmax attention that it gets from the `size` queries from itself on, each over the last
`size` tokens: the same sliding window for every token, wherever its block begins, and known when the next block ends.
It is summed in float64 and compared in float32, so that tokens that are equal but for rounding tie and the earlier one
wins: one call, pieces and single steps then choose the same tokens.
"""

import torch

from linearize.ops.blocks import Blocks
from linearize.ops.window import capped

ABSENT = -1.0
"""The score of a place without a token; saliency is never negative."""


@torch.no_grad()
def attention_received(
    q: torch.Tensor, k: torch.Tensor, exists: torch.Tensor, blocks: Blocks, *, softcap: float | None = None
) -> torch.Tensor:
    """What the call's queries add to the saliency of the tokens in each column: `[B, columns, H]` float64.

    q `[B, N, H, c, K]` scaled and k `[B, N, H, span, K]`, bands of one older block; exists `[B, N, span]`; softcap as
    in `linearize.ops.window.capped`.
    """
    ages = blocks.ages()[:, None]
    near = (ages >= 0) & (ages < blocks.size) & exists[:, :, None] | (ages == 0)
    scores = capped(q.double() @ k.double().transpose(-1, -2), softcap)
    weights = scores.masked_fill(~near[:, :, None], float("-inf")).softmax(-1)
    weights = torch.where(blocks.real()[:, :, None, :, None], weights, 0).sum(-2)  # [B, N, H, span]
    older, own = weights.unflatten(-1, (2, blocks.size)).unbind(-2)
    none = torch.zeros_like(own[:, :1])
    received = torch.cat([older, none], dim=1) + torch.cat([none, own], dim=1)
    return received.transpose(2, 3).flatten(1, 2)


@torch.no_grad()
def choose(scores: torch.Tensor, blocks: Blocks, bank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block by block, keep the `bank` highest scores of the bank and of the block that leaves the band.

    scores `[B, H, bank + columns]` float32: those in the bank, then those in the columns; ABSENT where there is none.
    Returns indices into them: the bank that each block sees and the one after the call `[B, H, N + 1, bank]`, in the
    order of positions, and who is dropped at the end of each block `[B, H, N, size]`; and which of those are tokens
    that leave now `[B, H, N, size]`.
    """
    shape = scores.shape[:2]
    full = blocks.full()
    kept = torch.arange(bank, device=scores.device).expand(*shape, bank)
    banks, dropped = [kept], []
    for n in range(blocks.number):
        leaving = bank + n * blocks.size + torch.arange(blocks.size, device=scores.device)
        rivals = torch.cat([kept, leaving.expand(*shape, blocks.size)], dim=-1)
        order = scores.gather(-1, rivals).sort(dim=-1, descending=True, stable=True).indices
        chosen, rest = (rivals.gather(-1, part.sort(-1).values) for part in order.tensor_split([bank], dim=-1))
        kept = torch.where(full[:, n, None, None], chosen, kept)
        banks.append(kept)
        dropped.append(rest)
    gone = torch.stack(dropped, dim=2)
    leaves = full[:, None, :, None] & (scores.gather(-1, gone.flatten(2)).view_as(gone) > ABSENT)
    return torch.stack(banks, dim=2), gone, leaves
