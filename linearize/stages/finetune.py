"""Fine-tuning: next-token cross-entropy on the converted model, through LoRA adapters, in full, or on chosen tensors.

Source of the usual settings (LoRA rank 8 on q, k, v, o at 1e-4): LoLCATs (arXiv:2410.10254), section 3.2.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from linearize.losses import next_token
from linearize.stages.tuning.tuned import Tuned, TunedConfig
from linearize.training.loop import Batch, Metrics


class FinetuneConfig(TunedConfig):
    """Settings of the finetune stage."""

    type: Literal["finetune"] = "finetune"


class Finetune(Tuned):
    """See the module docstring."""

    Config: ClassVar[type[TunedConfig]] = FinetuneConfig

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        hidden, targets = self.hidden(model, batch)

        def loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return next_token(self.family.logits(model, hidden), targets)[None]

        return {"loss": self.descend(loss, weight, hidden, targets)[0]}
