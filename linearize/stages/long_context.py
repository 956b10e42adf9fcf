"""Next-token training on sequences longer than those of the stages before, usually the last stage of a conversion.

RADLADS (arXiv:2505.03005) and HALO (arXiv:2601.22156) end with cross-entropy at 16K tokens. The loss is that of
`finetune`; what is new is the length, and the positions of a source that was not made for it. `positions` says how its
rotary embedding changes, for all layers that rotate, and the exported configuration says it too, with
`max_position_embeddings` raised. Layers that gave up their rotary embedding (`kept: {rope: false}`) need no change. The
source inside the converted model has these positions too, and so is no teacher any more: with a policy other than
`keep` no later stage may need it, and `evaluation.divergence` must be false.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from linearize.data import DataConfig, PackedDataset
from linearize.errors import UserError
from linearize.positions import Policy, extend, extended
from linearize.schema import Count
from linearize.stages.finetune import Finetune
from linearize.stages.tuning.tuned import TunedConfig


class LongContextConfig(TunedConfig):
    """Settings of the long_context stage."""

    type: Literal["long_context"] = "long_context"
    seq_len: Count = Field(gt=1, description="Tokens per sequence, more than data.seq_len.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate.")
    positions: Policy = Field(
        "keep",
        description="How rotary positions reach seq_len: keep, as they are; yarn or linear, scaled by seq_len over "
        "max_position_embeddings of the source; theta, with the base that `theta` gives.",
    )
    theta: float | None = Field(None, gt=1, description="New base of the rotary embedding, with positions: theta.")

    @model_validator(mode="after")
    def _theta_has_its_policy(self) -> LongContextConfig:
        if (self.positions == "theta") != (self.theta is not None):
            raise ValueError(
                f"positions: theta needs theta, and no other policy reads it; got positions: {self.positions} and "
                f"theta: {self.theta}"
            )
        return self


class LongContext(Finetune):
    """See the module docstring."""

    Config = LongContextConfig
    config: LongContextConfig
    extended = False
    """Whether the model has its new positions already."""

    def check_data(self, own: DataConfig, recipe: DataConfig) -> None:
        super().check_data(own, recipe)
        if own.seq_len <= recipe.seq_len:
            raise UserError(
                f"stage long_context: seq_len {own.seq_len:,} is not longer than data.seq_len {recipe.seq_len:,}; "
                "raise it, or use finetune"
            )

    def check(self, model: Any) -> None:
        super().check(model)
        if not self.extended:
            self._changes(model, self.keep_source)

    def run(
        self,
        model: Any,
        data: PackedDataset | None,
        folder: Path,
        resume: bool = False,
        keep_source: bool = False,
    ) -> float:
        """As every stage's; the positions change first, whether it trains or restores."""
        extend(model, self.family, self._changes(model, keep_source))
        self.extended = True
        return super().run(model, data, folder, resume, keep_source)

    def _changes(self, model: Any, keep_source: bool) -> dict[str, Any]:
        config = self.config
        if keep_source and config.positions != "keep":
            raise UserError(
                f"stage long_context: positions: {config.positions} changes what the source model inside this one "
                "computes, and something needs it afterwards; put the stage after those that need the teacher and set "
                "evaluation.divergence: false, or use positions: keep"
            )
        return extended(model.config, self.family, config.seq_len, config.positions, config.theta)
