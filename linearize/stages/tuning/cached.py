"""The teacher's likeliest tokens on disk: made once for the rows that a stage visits, then read beside them.

A prediction takes 8 k + 4 bytes: k tokens (int32), their log-probabilities and that of all others together (float32).
Half precision would take 6 k + 2, and is not enough: on logits like a language model's, with a student 0.0024 nats
away, it moved the KL of a prediction by 2% of its mean (root mean square) and gradients by 0.8%, float32 by 1e-5 and
1e-6 of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from linearize.data import PackedDataset, predicted
from linearize.errors import UserError
from linearize.progress import bar
from linearize.training.checkpoint import write_tensors
from linearize.training.loop import Batch
from linearize.training.processes import processes, rank

LOG_PROBS, TOKENS = "teacher_log_probs", "teacher_tokens"
"""What is added to a batch, for its N predictions in order: [N, k + 1], the last of all other tokens, and [N, k]."""
SHARD_VALUES = 1 << 22
"""Log-probabilities per file, about; a killed run computes at most one file again."""

Predict = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""Both tensors of a batch."""


def shards(data: PackedDataset, rows: Sequence[int], top_k: int) -> list[list[int]]:
    """The rows of each file."""
    size = max(1, SHARD_VALUES // (data.seq_len * (top_k + 1)))
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def write_predictions(
    folder: Path, data: PackedDataset, rows: Sequence[int], facts: dict[str, Any], batch_size: int, predict: Predict
) -> None:
    """Write the files that are missing in `folder`; of several processes each writes its share.

    Args:
        folder: for these files alone.
        data: the stage's rows.
        rows: indices of those that it visits.
        facts: what the predictions depend on, "top_k" among it; checked when they are read.
        batch_size: rows that are predicted at once.
        predict: the teacher.

    Raises:
        UserError: for a file there that is damaged or of something else, or when the disk is full.
    """
    own = list(enumerate(shards(data, rows, facts["top_k"])))[rank() :: processes()]
    with bar("teacher", unit="tok", total=sum(len(part) for _, part in own) * data.seq_len) as shown:
        for number, part in own:
            path = _path(folder, number)
            if path.exists():
                _read(path, {**facts, "rows": part})
            else:
                found, counts = [], []
                for i in range(0, len(part), batch_size):
                    batch = data.batch(part[i : i + batch_size])
                    counts.append(predicted(batch).sum(1))
                    found.append(predict(batch))
                log_probs, tokens = (torch.cat([t.cpu() for t in column]) for column in zip(*found, strict=True))
                tensors = {"log_probs": log_probs.float(), "tokens": tokens.int(), "counts": torch.cat(counts)}
                write_tensors(path, tensors, {**facts, "rows": part})
            shown.update(len(part) * data.seq_len)


class WithPredictions:
    """A data set whose batches carry the teacher's predictions as well; only rows that were predicted have any.

    Raises:
        UserError: when a file is missing, damaged, or of other rows or another teacher.
    """

    def __init__(self, folder: Path, data: PackedDataset, rows: Sequence[int], facts: dict[str, Any]):
        self.data = data
        self.seq_len, self.item_tokens = data.seq_len, data.item_tokens
        self._place: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for number, part in enumerate(shards(data, rows, facts["top_k"])):
            log_probs, tokens, counts = _read(_path(folder, number), {**facts, "rows": part})
            ends = itertools.accumulate(counts.tolist(), initial=0)
            for row, (start, end) in zip(part, itertools.pairwise(ends), strict=True):
                self._place[row] = log_probs[start:end], tokens[start:end]

    def __len__(self) -> int:
        return len(self.data)

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """As that of the data."""
        return self.data.order(seed, epoch)

    def batch(self, indices: Sequence[int]) -> Batch:
        """As that of the data, with the predictions of these rows."""
        log_probs, tokens = zip(*(self._place[int(index)] for index in indices), strict=True)
        return {**self.data.batch(indices), LOG_PROBS: torch.cat(log_probs), TOKENS: torch.cat(tokens)}


def _path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _read(path: Path, facts: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, tokens and predictions per row of a file, memory-mapped."""
    remedy = "delete that file and resume, and the teacher computes it again"
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["state"])
            tensors = tuple(file.get_tensor(name) for name in ("log_probs", "tokens", "counts"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the teacher's predictions in {path} are damaged ({error}); {remedy}") from error
    for name, value in facts.items():
        if found.get(name) != value:
            raise UserError(f"the teacher's predictions in {path} were made for other {name}; {remedy}")
    return tensors
