"""Direct preference optimisation: of two replies to a prompt, make the chosen one likelier than the rejected one.

    L = -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
    h = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)

averaged over pairs; p are those of whole replies given the prompt, whose own tokens are not scored. Equation 7 of
Rafailov et al. 2023 (arXiv:2305.18290), with the label smoothing s of conservative DPO (Mitchell 2023). `loss: ipo` is
(h - 1 / (2 beta))^2: Azar et al. 2023 (arXiv:2310.12036), equation 17, on sums over tokens as there. The Mamba in the
Llama (arXiv:2408.15237) ends its distillation with DPO. The reference model is the stage's own beginning, for which
only tensors that train are held twice, or the source. Both replies of a pair lie in one batch, the chosen one first;
how they are read and cut is said in `linearize/data/preference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.data import predicted
from linearize.evals.text import evaluating
from linearize.losses import preference
from linearize.snapshot import Snapshot
from linearize.stages.tuning.tuned import Tuned, TunedConfig
from linearize.training.loop import Batch, Metrics
from linearize.training.precision import backpropagate


class DPOConfig(TunedConfig):
    """Settings of the dpo stage; `batch_size` and `micro_batch_size` count pairs."""

    type: Literal["dpo"] = "dpo"
    lr: float = Field(5e-7, gt=0, description="Peak learning rate.")
    beta: float = Field(0.1, gt=0, description="How much a change of likelihood counts; large keeps to the reference.")
    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="Logistic loss of DPO, or the square of IPO.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs taken to be labelled the wrong way.")
    reference: Literal["start", "source"] = Field(
        "start", description="The model as it is when the stage begins, or the source model."
    )

    @model_validator(mode="after")
    def _no_request_is_ignored(self) -> DPOConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to loss: sigmoid, and loss is ipo; leave one of them out")
        return self


class DPO(Tuned):
    """See the module docstring."""

    Config = DPOConfig
    item_rows = 2
    config: DPOConfig

    def __init__(self, config: DPOConfig, family: Any):
        super().__init__(config, family)
        self.start = Snapshot()

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether it looks at the source model."""
        return self.config.reference == "source"

    def begin(self, model: Any) -> tuple[dict[str, torch.dtype], dict[str, nn.Parameter]]:
        dtypes, parameters = super().begin(model)
        if self.config.reference == "start":
            self.start.keep(parameters.values())
        return dtypes, parameters

    def finish(self, model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        self.start = Snapshot()  # gives the memory back
        return super().finish(model, parameters)

    @contextmanager
    def reference(self, model: Any) -> Iterator[None]:
        """Inside the context `model` is the reference model, in eval mode and without gradients."""
        if self.config.reference == "source":
            with self.teacher(model):
                yield
        else:
            with evaluating(model), self.start.as_kept():
                yield

    def count(self, batch: Batch) -> int:
        return len(batch["labels"]) // 2

    def backward(self, model: Any, batch: Batch, weight: float) -> Metrics:
        with self.reference(model):
            expected = self.log_likelihoods(model, batch)
        change = self.log_likelihoods(model, batch) - expected
        h = change[0::2] - change[1::2]
        config = self.config
        loss = preference(h, config.loss, config.beta, config.label_smoothing)
        backpropagate(loss * weight)
        h = h.detach()
        return {"loss": loss.detach(), "accuracy": (h > 0).float().sum(), "margin": config.beta * h.sum()}

    def log_likelihoods(self, model: Any, batch: Batch) -> torch.Tensor:
        """log p [B] of each row's labels given what precedes them, summed over tokens, float32."""
        hidden, targets = self.hidden(model, batch)
        labels = batch["labels"]
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels[:, 1:])[predicted(batch)]

        def per_row(hidden: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            logits = self.family.logits(model, hidden).float()
            found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            return found.new_zeros(len(labels)).index_add(0, rows, found)

        return self.scored(per_row, hidden, targets, rows)
