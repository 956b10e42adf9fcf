"""STILL: the tokens that matter stay in softmax attention, the others are summed by linear attention.

    y_t = (f sum_exact exp(s_ti - c_t) v_i + sum_others phi(q_t).phi(k_i) v_i) / (the same with v_i -> 1)

with s_ti = scale * q_t.k_i, c_t the largest of them, f = sigmoid(w) per head and phi the norm-preserving map. Positions
are cut into blocks of `window` tokens. Exact for a query are its own block up to itself, the block before, and a bank
of the `bank` most salient tokens among all earlier ones; every other earlier token is in the linear sum. When a block
ends, the block before it leaves the local range: its tokens compete with those in the bank, and who loses goes into the
linear sum and never returns.

Saliency is the softmax attention that a token gets from the `window` queries from itself on, each over its last
`window` tokens. It needs a constant state and no later token, and is known when the token's block leaves the local
range. Each query head chooses for itself (its linear sum is its own in any case, and larger than the bank), so query
heads that share keys may keep different tokens. No gradient goes through the choice, only through attention and
features.

STILL: Selecting Tokens for Intra-Layer Hybrid Attention to Linearize LLMs (2026, arXiv:2602.02180). Only the abstract
was available: a self-saliency score from a sliding window, sparse softmax on salient tokens, linear attention on the
rest, the norm-preserving map, chunks in parallel with delayed selection. Score, blocks and bank are this toolkit's.

Traps: the first 2 * window + bank tokens of a row have no linear sum, so training needs rows much longer than that. The
choice is discrete: in low precision, where keys differ between reading a text at once and token by token, so may the
bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.mixers.parts.base import part
from linearize.mixers.parts.blocks import BlockMixer, BlockMixerConfig
from linearize.mixers.parts.feature_maps.norm_preserving import NormPreservingConfig


@dataclass(frozen=True)
class StillConfig(BlockMixerConfig):
    """Settings of the still mixer."""

    feature_map: Any = part("feature_maps", NormPreservingConfig)
    bank: int = 64
    """Tokens from before the local blocks that stay in the softmax, per query head; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank < 0:
            raise ValueError(f"bank must be 0 or more tokens, got {self.bank}")


class Still(BlockMixer):
    """See the module docstring. State: the local blocks and their saliency so far, the bank, its scores, S and z."""

    Config = StillConfig
    back = 1

    @property
    def bank(self) -> int:
        return self.config.bank
