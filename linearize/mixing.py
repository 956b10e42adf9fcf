"""Mixing matrices of a layer, one per query head: the softmax teacher's weights, and those of the mixer in its place.

Row t, column s is the weight of the value of token s in what token t reads; both stand where the batch has its tokens,
whichever side is padded. Rows and columns of padding mean nothing in rows, and are zero in columns that a real query
reads.
"""

from __future__ import annotations

import torch

from linearize.batch import reordered
from linearize.swap import Call, SwappedAttention
from linearize.teacher import teacher_logits


def teacher_matrix(attn: SwappedAttention, call: Call) -> torch.Tensor:
    """The source's attention weights [B, Hq, T, T], float32, with the weights that `attn` holds at the moment."""
    weights = teacher_logits(attn, call).softmax(-1)
    back = call.batch.inverse
    if back is None:
        return weights
    rows = reordered(weights.permute(0, 2, 3, 1), back)  # [B, T, T, Hq]
    return reordered(rows.transpose(1, 2), back).permute(0, 3, 2, 1)


def mixer_columns(attn: SwappedAttention, call: Call, columns: slice = slice(None)) -> torch.Tensor:
    """These columns of the mixer's matrices, [B, Hq, T, columns], read out by mixing one-hot values.

    They say all of the mixer only where it is `linear_in_values`; see also `Mixer.only_mixing`.
    """
    rows, tokens = call.x.shape[:2]
    one_hot = torch.eye(tokens, device=call.x.device, dtype=call.x.dtype)[None, :, None, columns]
    values = one_hot.expand(rows, -1, attn.mixer.shape.kv_heads, -1)
    return attn.heads(call.x, call.position, call.batch, values=values)[0].transpose(1, 2)
