"""Trains parameters of which each of two processes reaches another one, and writes them down: see test_processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linearize.training.config import TrainingConfig
from linearize.training.loop import train
from linearize.training.processes import rank


class Rows:
    """Two rows of one token, which is the row's number."""

    seq_len = item_tokens = 1

    def __len__(self) -> int:
        return 2

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        return torch.arange(2)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(indices)[:, None]}


def main(folder: Path) -> None:
    """The loss of row 0 depends on `first`, that of row 1 on `second`; each process writes what it has at the end."""
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("first", "second", "nobody")}
    sizes: dict[str, Any] = {"tokens": 6, "batch_size": 2, "micro_batch_size": 1}
    config = TrainingConfig(type="none", lr=0.1, schedule="constant", weight_decay=0.5, clip=None, **sizes)

    def backward(batch: dict[str, torch.Tensor], weight: float) -> dict[str, torch.Tensor]:
        loss = parameters[("first", "second")[int(batch["input_ids"])]].square().sum()
        (loss * weight).backward()
        return {"loss": loss.detach()}

    rows: Any = Rows()
    train(config, parameters, rows, folder / "run", backward=backward, count=lambda batch: 1)
    (folder / f"{rank()}.json").write_text(json.dumps({name: p.tolist() for name, p in parameters.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
