"""How kept softmax layers see positions: without rotary embedding, with logits that grow with the length, or both.

A hybrid whose linear layers carry the order can leave it out of the softmax layers, which then work at lengths they
were not trained on: HALO (2026, arXiv:2601.22156) and Kimi Linear (2025, arXiv:2510.26692). `linearize.swap` extends
the attention class of such a layer by `KeptAttention`; by default kept layers are not touched at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from linearize.arguments import by_name
from linearize.families.base import Family


@dataclass(frozen=True)
class Kept:
    """What changes in the layers that keep their softmax attention; by default nothing."""

    rope: bool = True
    """Whether queries and keys are rotated."""
    log_scale: int | None = None
    """Length in tokens up to which logits are the source's, and beyond which they grow; None for never."""

    def __str__(self) -> str:
        said = [] if self.rope else ["no rotary embedding"]
        if self.log_scale is not None:
            said.append(f"logits times log t / log {self.log_scale:,} from token {self.log_scale:,} on")
        return ", ".join(said) or "as in the source"


AS_IN_SOURCE = Kept()
"""Nothing changes."""


def kept_of(description: Mapping[str, Any]) -> Kept:
    """What a checkpoint's config says about its kept layers; see `linearize.swap.mixer_specs`."""
    return Kept(**description.get("kept", {}))


def log_length(positions: torch.Tensor, length: int) -> torch.Tensor:
    """s_t = max(1, log(t + 1) / log(length)), t the position from 0: the factor on the logits of query t.

    Softmax over t tokens flattens as t grows; a factor with the logarithm of t keeps how much the largest logit stands
    out. This is the form that starts at the training length, before which the model is the source's (log-n attention of
    Qwen's `use_logn_attn`); Scalable-Softmax (Nakanishi 2025, arXiv:2501.19399) learns the factor.

    Args:
        positions: [B, T], any numeric type.
        length: tokens up to which the factor is exactly 1; more than 1.

    Returns:
        [B, T] float32.
    """
    return 1 + ((positions + 1).float() / length).log().clamp(min=0) / math.log(length)


class QueryScale:
    """Multiplies a layer's queries by `factor` [B or 1, T], while there is one, where the family makes them.

    It is a hook on the last module that makes queries. LoRA puts another module in that one's place, and takes it out
    again: `bind` moves the hook along.
    """

    def __init__(self, attn: Any, family: type[Family]):
        self.attn, self.family = attn, family
        self.factor: torch.Tensor | None = None
        self.module: nn.Module | None = None
        self.handle: RemovableHandle | None = None
        self.bind()

    def bind(self) -> None:
        """Be the hook of the module that makes queries now."""
        module = self.family.query_module(self.attn)
        if module is not self.module:
            if self.handle is not None:
                self.handle.remove()
            self.module, self.handle = module, module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if self.factor is None:
            return output
        return self.family.scale_queries(self.attn, output, self.factor).to(output.dtype)


class KeptAttention(nn.Module):
    """What a swap adds to the attention class of a kept layer, in front of it in the method resolution order."""

    kept: Kept
    family: type[Family]
    teacher: bool
    query_scale: QueryScale | None
    names: ClassVar[tuple[str, ...]]
    """Names of the arguments of the family's attention, in order."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.teacher:
            return super().forward(*args, **kwargs)
        given = by_name(self.names, args, kwargs)
        if not self.kept.rope:
            cos, sin = given["position_embeddings"]
            given["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        if self.query_scale is None:
            return super().forward(**given)
        assert self.kept.log_scale is not None
        self.query_scale.bind()
        self.query_scale.factor = log_length(given["position_ids"], self.kept.log_scale)
        try:
            return super().forward(**given)
        finally:
            self.query_scale.factor = None
