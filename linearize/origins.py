"""What a conversion comes from: the rows of its stages and of its calibration, and the weights of the source model.

A resumed conversion that came from others would train on top of, and be measured beside, results of the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linearize.data import PackedDataset
from linearize.errors import UserError, write_whole
from linearize.inits.calibrated import Inputs
from linearize.stages.base import RESULT, Stage, facts_of
from linearize.training.checkpoint import newest_checkpoint, read_state

CALIBRATION = "calibration.json"
"""File in `run` that tells the rows that mixers were calibrated on from others."""
SOURCE = "source.json"
"""File in `run` that tells the weights of the source model from others."""
SAMPLED = 1024
"""Values of each tensor that do so, evenly spread: hashing all would take minutes on large models."""


def check_rows(stage: Stage, data: PackedDataset | None, folder: Path) -> None:
    """Raise a UserError if what a stage left in its `folder` was trained on other rows than those of `data`."""
    finished = Stage.finished(folder)
    file = folder / RESULT if finished else newest_checkpoint(folder)
    if data is None or file is None:
        return
    told, now = read_state(file), facts_of(data)
    if finished and told.get("max_tokens") != now["max_tokens"]:
        return  # of a stream as much is read as the stages need, and later ones may have changed
    if told.get("data", now["data"]) != now["data"]:
        source = data.info["config"]["source"]
        raise _changed_data(f"stage {stage.config.type}: the training data", source, f"{file} was written")


def check_calibration(out: Path, batches: Sequence[Inputs], source: str) -> None:
    """Raise a UserError if the conversion in `out` was calibrated on other rows than these, read from `source`.

    A resumed conversion calibrates again: what stages do not train comes from there.
    """
    if _differs(out / "run" / CALIBRATION, _rows(batches)):
        raise _changed_data("the data of the calibration (init)", source, "the conversion began")


def note_calibration(out: Path, batches: Sequence[Inputs]) -> None:
    """Write down for `check_calibration` what the conversion in `out` was calibrated on first."""
    _note(out / "run" / CALIBRATION, _rows(batches))


def check_source_model(out: Path, model: Any, name: str) -> None:
    """Raise a UserError if the conversion in `out` began with other weights than those of the source `model`.

    `name` is the recipe's for it.
    """
    if _differs(out / "run" / SOURCE, _weights(model)):
        raise UserError(
            f"the weights of the source, model.name={name!r}, are others than when the conversion in {out} began; put "
            "them back (a repository's earlier ones by model.revision), or convert into another folder"
        )


def note_source_model(out: Path, model: Any) -> None:
    """Write down for `check_source_model` what weights the conversion in `out` began with."""
    _note(out / "run" / SOURCE, _weights(model))


def weights_digest(model: Any) -> str:
    """Tells a model's weights from others, by `SAMPLED` values of each tensor."""
    return _digest([{f"{name} {t.dtype} {list(t.shape)}": _some(t) for name, t in model.state_dict().items()}])


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)].cpu()


def _digest(groups: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """Tells tensors on the CPU from others, by their names, shapes and bytes."""
    content = hashlib.sha256()
    for group in groups:
        for name, tensor in sorted(group.items()):
            content.update(f"{name}{list(tensor.shape)}".encode())
            content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _rows(batches: Sequence[Inputs]) -> str:
    return json.dumps({"rows": _digest(batches)}) + "\n"


def _weights(model: Any) -> str:
    return json.dumps({"weights": weights_digest(model)}) + "\n"


def _note(place: Path, text: str) -> None:
    if not place.exists():
        write_whole(place, text)


def _differs(place: Path, text: str) -> bool:
    """Whether something else than `text` was noted at `place`."""
    return place.exists() and place.read_bytes() != text.encode()


def _changed_data(what: str, source: str, since: str) -> UserError:
    return UserError(
        f"{what} changed since {since}: data.source={source!r} gives other rows now; put it back as it was, or convert "
        "into another folder"
    )
