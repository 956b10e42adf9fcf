"""The family contract: where attention sits in an architecture and how its heads are made.

A family is a class of static facts and small functions about one Hugging Face `model_type`; nothing else in the package
branches on an architecture. Subclass it in a file named after the `model_type`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from linearize.mixers.base import HeadShape

Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Family:
    """Static description of one architecture; never instantiated."""

    model_class: ClassVar[type]
    """The causal LM class, e.g. transformers.LlamaForCausalLM."""
    config_class: ClassVar[type]
    """Its configuration class."""
    attention_class: ClassVar[type]
    """The attention module class that a swap extends."""
    lora_targets: ClassVar[dict[str, str]]
    """Short names q, k, v, o of the projections -> module names, for LoRA."""

    @staticmethod
    def base_model(model: nn.Module) -> nn.Module:
        """The module whose forward receives the 2-D attention mask and the position ids."""
        raise NotImplementedError

    @staticmethod
    def attentions(model: nn.Module) -> dict[str, nn.Module]:
        """Full module name -> attention module, in layer order."""
        raise NotImplementedError

    @staticmethod
    def shape(config: Any, layer: int) -> HeadShape:
        """Sizes of one layer's attention."""
        raise NotImplementedError

    @staticmethod
    def project(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T, C] -> q [B, T, Hq, K], k [B, T, Hkv, K], v [B, T, Hkv, V], before the rotary embedding."""
        raise NotImplementedError

    @staticmethod
    def query_module(attn: Any) -> nn.Module | None:
        """The last module that makes queries before they are rotated, whose output [B, T, ...] is the queries alone: a
        q-norm where there is one, else the projection. None where there is no such module, as with a fused projection:
        kept layers can then not scale their logits.
        """
        return None

    @staticmethod
    def output_projection(attn: Any) -> nn.Module:
        """The module that maps concatenated heads [B, T, Hq * V] back to [B, T, C]."""
        raise NotImplementedError

    @staticmethod
    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the position embedding to q [B, T, Hq, K] and k [B, T, Hkv, K]; cos, sin are [B, T, R]."""
        raise NotImplementedError

    @staticmethod
    def concerns(config: Any) -> list[str]:
        """What a mixer cannot honour on a model with this config; the plan prints it."""
        return []
