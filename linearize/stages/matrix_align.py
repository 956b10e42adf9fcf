"""Alignment of mixing matrices: pull what a mixer does to values towards the softmax weights that it replaced.

    L = mean over heads of |M_teacher - M_student|_F,    M [T, T] of one row, on the teacher's input of the layer

"Matrix orientation", the first stage of MOHAWK (Bick et al. 2024, arXiv:2408.10189). The student's matrix is that of
the mixing alone (`Mixer.only_mixing`), as MOHAWK's gate and convolution are the identity here: convolutions of queries
and keys are part of it; those of values, norms, gates, skips, clones and what else follows the read-out are not, and
train later. Rows of padding are left out, and packed documents are blocks of one matrix.

Both matrices are read on the spot, layer by layer. The teacher's are whole, 4 B Hq T^2 bytes and three times that while
they are made; the student's come in pieces of `columns` columns, each computed again in the backward pass, so that its
graphs are those of an ordinary forward of one layer with values of that size. At T = 1024 and 32 heads, as in Llama 3
8B, that is 0.13 GB (0.4 GB) per row of a micro-batch for the teacher, at T = 4096 2.1 GB (6.4 GB).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from linearize.errors import UserError
from linearize.mixing import mixer_columns, teacher_matrix
from linearize.stages.tuning.forced import Forced, ForcedConfig
from linearize.swap import Call, SwappedAttention, swapped
from linearize.training.loop import Batch


class MatrixAlignConfig(ForcedConfig):
    """Settings of the matrix_align stage."""

    type: Literal["matrix_align"] = "matrix_align"
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    loss: Literal["frobenius"] = Field(
        "frobenius", description="Norm of the difference of the matrices, mean over heads and sequences."
    )
    columns: int = Field(
        512, gt=0, description="Columns of the student's matrices in memory at once; changes memory and speed only."
    )


class MatrixAlign(Forced):
    """See the module docstring."""

    Config = MatrixAlignConfig
    config: MatrixAlignConfig

    def prepare(self, model: Any) -> dict[str, nn.Parameter]:
        for attn in swapped(model).values():
            with attn.mixer.only_mixing():
                if not attn.mixer.linear_in_values:
                    raise UserError(
                        f"stage matrix_align compares mixing matrices, and {type(attn.mixer).__name__} has none: what "
                        "it writes depends on its values, or is not them alone; use attention_transfer or "
                        "hidden_align"
                    )
        return super().prepare(model)

    def count(self, batch: Batch) -> int:
        """Sequences that are not all padding."""
        mask = batch.get("attention_mask")
        return len(batch["input_ids"]) if mask is None else int(mask.any(1).sum())

    def target(self, attn: SwappedAttention, call: Call, heads: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return teacher_matrix(attn, call)

    def layer_loss(
        self, attn: SwappedAttention, call: Call, target: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        def squared(columns: slice) -> torch.Tensor:
            with attn.mixer.only_mixing():
                found = mixer_columns(attn, call, columns)
            error = found.float() - target[..., columns]
            if keep is not None:
                error = torch.where(keep[:, None, :, None], error, 0)
            return error.square().sum((-2, -1))

        size, tokens = self.config.columns, call.x.shape[1]
        pieces = [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
        total = sum(checkpoint(squared, piece, use_reentrant=False) for piece in pieces)  # [B, Hq]
        return (total + 1e-12).sqrt().mean(1).sum()
