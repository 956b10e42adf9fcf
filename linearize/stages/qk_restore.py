"""The source's queries and keys put back, after training, into the layers that keep softmax. Trains nothing.

Fine-tuning a hybrid on short reasoning pulls the queries and keys of its softmax layers towards what is near, and with
them goes its recall over long distances; putting W_Q and W_K back restores much of it: QK-Restore (arXiv:2606.11052),
here with the biases and norms that also make queries and keys. There the values are those from before supervised
fine-tuning, here the source's, so what an earlier stage taught these projections goes too. It matters where layers
gave up their rotary embedding (`kept: {rope: false}`) and were taught to do without it.

Which elements make queries and keys is read off their gradient, so fused projections need no case of their own.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from linearize.errors import UserError
from linearize.families.base import Family
from linearize.stages.base import Edit
from linearize.swap import SwappedAttention, source_weights
from linearize.training.config import StageConfig

_LOG = logging.getLogger(__name__)


class QKRestoreConfig(StageConfig):
    """The stage has no settings."""

    type: Literal["qk_restore"] = "qk_restore"


class QKRestore(Edit):
    """See the module docstring."""

    Config = QKRestoreConfig
    needs_teacher = True
    config: QKRestoreConfig

    def check(self, model: Any) -> None:
        if not self._kept(model):
            raise UserError(
                "stage qk_restore: no layer keeps its softmax attention, so there is nothing to put queries and keys "
                "back into; remove the stage, or keep layers with a pattern such as layers: LLLS"
            )

    def edit(self, model: Any) -> dict[str, torch.Tensor]:
        self.check(model)
        source, changed = source_weights(model), {}
        names = {p: name for name, p in model.named_parameters()}
        for layer, attn in self._kept(model).items():
            for p, mask in query_key_elements(attn, self.family, self.family.shape(model.config, layer).hidden_size):
                kept = source.kept(p)
                if kept is not None:
                    p.copy_(torch.where(mask, kept, p))
                    changed[names[p]] = p.data
        if not changed:
            _LOG.info("qk_restore: no stage before it changed queries or keys of a layer that keeps softmax")
        return changed

    def _kept(self, model: Any) -> dict[int, nn.Module]:
        layers = self.family.attentions(model).values()
        return {i: attn for i, attn in enumerate(layers) if not isinstance(attn, SwappedAttention)}


def query_key_elements(attn: Any, family: type[Family], width: int) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The parameters of an attention module that make its queries or keys, and which of their elements do.

    Gradients that are not a number are sent back from queries and keys: they reach these elements, and no others.

    Args:
        attn: the module.
        family: its family.
        width: of its input.

    Returns:
        Each parameter with a bool mask of its shape.
    """
    own = list(attn.parameters())
    asked = [p.requires_grad for p in own]
    x = torch.ones(1, 1, width, device=own[0].device, dtype=own[0].dtype)
    with torch.enable_grad():
        try:
            for p in own:
                p.requires_grad_(True)
            q, k, _ = family.project(attn, x)
            made = family.normed(attn, q, k)
            poison = [torch.full_like(t, float("nan")) for t in made]
            found = torch.autograd.grad(made, own, poison, allow_unused=True)
        finally:
            for p, value in zip(own, asked, strict=True):
                p.requires_grad_(value)
    return [(p, grad.isnan()) for p, grad in zip(own, found, strict=True) if grad is not None and grad.isnan().any()]
