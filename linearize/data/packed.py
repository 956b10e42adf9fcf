"""Prepared sequences, read back memory-mapped: `PackedDataset`, and `batches` of them.

`batches` walks through the rows as a pure function of the step, so that a resumed run sees exactly what it would have
seen. `linearize.data.dataset` writes what is read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from linearize.errors import UserError
from linearize.ops.documents import positions

TENSORS = ("input_ids", "documents", "trained", "answers", "lengths")
"""What a shard holds of its rows: the fields of `linearize.data.packing.Row`."""
INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What of a batch a model is called with."""


class Rows(Protocol):
    """What training reads: sequences of `seq_len` tokens by index; see `PackedDataset`."""

    seq_len: int

    @property
    def item_tokens(self) -> int:
        """Tokens that belong together: those of a sequence, or of the two of a pair."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The sequences at `indices`."""
        ...

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """Indices of all sequences in the order of this epoch."""
        ...


class PackedDataset:
    """Sequences of `seq_len` tokens in a folder that `prepare` wrote, read when they are asked for.

    Its items are single rows, or pairs of rows where the data are preferences.

    Raises:
        UserError: when the folder is not a complete prepared data set.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.info: dict[str, Any] = json.loads((folder / "meta.json").read_text())
            files = [safe_open(folder / name, framework="pt") for name in self.info["shards"]]
            self._shards = [{name: file.get_tensor(name) for name in TENSORS} for file in files]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(
                f"prepared data in {folder} is damaged ({error}); delete that folder and run again"
            ) from error
        self.seq_len: int = self.info["seq_len"]
        self.shuffle: bool = self.info["shuffle"]
        self.item_rows: int = self.info.get("item_rows", 1)
        """Rows of an item: 2 where it is a pair, the chosen row first."""
        self._ends = np.cumsum([len(shard["lengths"]) for shard in self._shards])

    def __len__(self) -> int:
        """Number of items."""
        return int(self._ends[-1]) // self.item_rows

    @property
    def item_tokens(self) -> int:
        """Tokens of an item, padding counted."""
        return self.item_rows * self.seq_len

    @property
    def tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return self.info["tokens"]

    @property
    def content(self) -> str:
        """A digest of all rows, the same wherever and whenever they were prepared."""
        return self.info["content"]

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The items at `indices`: input_ids, labels, position_ids, maybe attention_mask, `[B, T]` int64, maybe answers.

        B is their number, of pairs twice that: chosen and rejected rows in turn.

        Labels follow HF: they stand at the index of their token, the loss shifts them. They are -100 on
        padding, on prompts if only completions train, and on the first token of every document, which nothing
        precedes. position_ids restart at 0 with every packed document; attention_mask is there only if a row
        is padded, and answers, `[B, T]` bool, only if a row is a recall document, whose answers it marks.
        """
        each = range(self.item_rows)
        rows = [self._row(int(index) * self.item_rows + part) for index in indices for part in each]
        ids, documents, trained, answers, lengths = (torch.stack(part) for part in zip(*rows, strict=True))
        batch = {"input_ids": ids.long(), "labels": ids.long().masked_fill(~trained, -100)}
        batch["position_ids"] = positions(documents)[1]
        if bool((lengths < self.seq_len).any()):
            batch["attention_mask"] = (torch.arange(self.seq_len) < lengths[:, None]).long()
        if bool(answers.any()):
            batch["answers"] = answers
        return batch

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """Indices `[len(self)]` of all items in the order of this epoch; 0, 1, 2, ... without shuffle."""
        if not self.shuffle:
            return torch.arange(len(self))
        # hashed, because the CPU generator takes no more than the low 32 bits of a seed
        digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.randperm(len(self), generator=generator)

    def _row(self, index: int) -> tuple[torch.Tensor, ...]:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"row {index} of {self._ends[-1]}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[shard])  # negative: counted from the shard's end
        return tuple(self._shards[shard][name][row] for name in TENSORS)


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch a model is called with, without its labels and what else stages read."""
    return {name: batch[name] for name in INPUTS if name in batch}


def predicted(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which places predict a label, [B, T - 1] bool: of token t + 1 at t, which is no target where it is masked."""
    return batch["labels"][:, 1:] != -100


def batches(
    dataset: Rows, batch_size: int, seed: int, start_step: int = 0, rank: int = 0, world: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of `batch_size` items from step `start_step` on, epoch after epoch.

    A step takes the next `world * batch_size` items of the epochs' orders, of which this `rank` gets its
    part.
    """
    epoch, order = -1, torch.empty(0)
    step = start_step
    while True:
        first = (step * world + rank) * batch_size
        indices = []
        for sample in range(first, first + batch_size):
            if sample // len(dataset) != epoch:
                epoch = sample // len(dataset)
                order = dataset.order(seed, epoch)
            indices.append(int(order[sample % len(dataset)]))
        yield dataset.batch(indices)
        step += 1


def visited(dataset: Rows, samples: int, seed: int) -> list[int]:
    """Indices, sorted, of the sequences among the first `samples` that `batches` walks through."""
    if samples >= len(dataset):
        return list(range(len(dataset)))
    return sorted(dataset.order(seed, 0)[:samples].tolist())
