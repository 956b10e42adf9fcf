"""How well an encoder with mixers agrees with itself under softmax attention, in what it makes of held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from linearize.evals.text import evaluating, windows_of
from linearize.swap import swapped, teacher_path


@dataclass(frozen=True)
class Agreement:
    """Mean cosine between the last hidden states of student and teacher over windows of one length."""

    length: int
    """Tokens per window."""
    embedding: float
    """Of the windows' embeddings, the mean of their tokens' states."""
    token: float
    """Of the tokens' states."""
    windows: int


def agreement(
    model: Any, token_ids: torch.Tensor, *, length: int, windows: int | None = None, batch_size: int = 4
) -> Agreement:
    """Run the mixers and the softmax attention that they replaced on the same windows of text.

    Args:
        model: a converted encoder.
        token_ids: [N] the text.
        length: tokens per window.
        windows: how many, evenly spaced over the text; all that fit when None.
        batch_size: windows per forward; changes speed and memory, not the result.

    Raises:
        UserError: when the text is shorter than one window.
    """
    family = next(iter(swapped(model).values())).family
    embeddings, tokens, count = 0.0, 0.0, 0
    with evaluating(model):
        for ids in windows_of(token_ids, length, windows, batch_size, model.device):
            student = family.base_model(model)(input_ids=ids).last_hidden_state.double()
            with teacher_path(model):
                teacher = family.base_model(model)(input_ids=ids).last_hidden_state.double()
            embeddings += float(cosine_similarity(student.mean(1), teacher.mean(1), dim=-1).sum())
            tokens += float(cosine_similarity(student, teacher, dim=-1).mean(1).sum())
            count += len(ids)
    return Agreement(length, embeddings / count, tokens / count, count)
