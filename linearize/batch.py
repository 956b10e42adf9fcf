"""What a layer must know of its batch: padding and packed documents, read from Hugging Face's masks and positions.

The base model's inputs say it once per forward; `linearize.swap` hands it on to every swapped layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """What the base model knows about a batch and every swapped layer needs, computed once per forward."""

    mask: torch.Tensor | None
    """[B, T] bool with the real tokens first in each row, or None."""
    documents: torch.Tensor | None
    """[B, T] int document ids, or None."""
    order: torch.Tensor | None
    """[B, T] gather index that brings real tokens to the front of their row, or None when they are there."""
    inverse: torch.Tensor | None
    """[B, T] gather index that undoes `order`."""

    @property
    def real(self) -> torch.Tensor | None:
        """[B, T] bool, which tokens are real where the batch has them, or None for all."""
        return self.mask if self.mask is None or self.inverse is None else self.mask.gather(1, self.inverse)

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """The same elsewhere: accelerate moves what a layer on another device is given by its `to`."""
        tensors = (self.mask, self.documents, self.order, self.inverse)
        return Batch(*(t if t is None else t.to(*args, **kwargs) for t in tensors))

    def head(self, tokens: int) -> Batch:
        """The same for the first `tokens` columns alone."""
        if self.real is not None:
            return _padded(self.real[:, :tokens])
        return Batch(None, None if self.documents is None else self.documents[:, :tokens], None, None)


NO_BATCH = Batch(None, None, None, None)
"""Nothing is padded, and every row is one document."""


def read_batch(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, rows: int, tokens: int, has_past: bool
) -> Batch:
    """Turn Hugging Face's mask and position ids into a `Batch`.

    Args:
        attention_mask: [B, past + T], 1 for real tokens; an absent mask, or several by kind of layer, say nothing about
            padding.
        position_ids: [B or 1, T], or [4, B, T] of which the first are the text's (Qwen2.5-VL); where they do not rise
            by one, a packed document begins (only read without a mask and without a past, as Hugging Face's own masks
            do).
        rows: B.
        tokens: T.
        has_past: whether a cache already holds tokens.

    Raises:
        ValueError: for a mask of who sees whom, [B, 1, T, past + T], which a recurrence cannot honour.
    """
    if isinstance(attention_mask, torch.Tensor):
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; mixers read padding from [B, T] and "
                "cannot follow a mask of who sees whom: give a 2-D one, or for packed documents none, and position_ids "
                "that begin again at 0 with each"
            )
        return _padded(attention_mask[:, -tokens:].bool())
    if attention_mask is not None:
        return NO_BATCH
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids is None or has_past or position_ids.ndim != 2:
        return NO_BATCH
    begins = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if not begins.any():
        return NO_BATCH
    documents = torch.nn.functional.pad(begins.cumsum(1), (1, 0))
    return Batch(None, documents.expand(rows, -1), None, None)


def _padded(mask: torch.Tensor) -> Batch:
    if torch.compiler.is_compiling():  # cannot branch on data
        if mask.shape[1] == 1:
            return Batch(mask, None, None, None)
    elif mask.all():
        return NO_BATCH
    elif not (mask[:, 1:] & ~mask[:, :-1]).any():
        return Batch(mask, None, None, None)
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return Batch(mask.gather(1, order), None, order, torch.argsort(order, dim=1))


def reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [B, T, ...] with its tokens in the order of the index [B, T]."""
    index = order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
