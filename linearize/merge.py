"""Averages checkpoints of one architecture: `merge(["a", "b"], "out")` writes the mean of their tensors.

Model soups (Wortsman et al. 2022, arXiv:2203.05482). Tensors are averaged in float32, one at a time; in memory is one
shard of the result, whatever the number and the size of the models. Works for converted checkpoints and all others in
safetensors.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from linearize.errors import UserError, check_target
from linearize.hf.export import ADAPTER, staged
from linearize.hf.folder import INDEX, SINGLE, check_folder, check_weights, read_text, recipe_in, weight_files
from linearize.schema import differences

VOLATILE = {"transformers_version", "_name_or_path"}
"""What the configurations of the same model may say differently."""
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Endings of files with weights, of which only the averaged ones are written."""


class _Checkpoint:
    """A folder's tensors, read one at a time."""

    def __init__(self, folder: Path):
        check_folder(folder)
        for adapter in (folder / ADAPTER / "adapter_config.json", folder / "adapter_config.json"):
            if adapter.is_file():
                raise UserError(f"{folder} holds a LoRA adapter ({adapter.name}); merge it into the weights first")
        self.folder = folder
        self.files = weight_files(folder)
        for name in self.files:
            check_weights(folder / name)
        self.readers = {name: safe_open(folder / name, framework="pt") for name in self.files}
        self.place = {key: name for name, reader in self.readers.items() for key in reader.keys()}  # noqa: SIM118

    def kind(self, key: str) -> tuple[list[int], str]:
        """Shape and dtype of a tensor, from the header alone."""
        part = self.readers[self.place[key]].get_slice(key)
        return part.get_shape(), part.get_dtype()

    def read(self, key: str) -> torch.Tensor:
        return self.readers[self.place[key]].get_tensor(key)


def merge(folders: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None) -> Path:
    """Write the weighted mean of checkpoints, all of it or nothing.

    The files of the first checkpoint (configuration, tokenizer, code, recipe) are copied, with a note in its model card
    and recipe; what lies in folders, such as a conversion's `run`, is not.

    Args:
        folders: two or more local checkpoints with the same configuration, tensors, shapes and types.
        out: a folder that does not exist yet.
        weights: one for each, from 0 to 1, that sum to 1. Default: the same for all.

    Returns:
        `out`.

    Raises:
        UserError: for checkpoints that are incomplete, differ, hold an adapter or are given twice, for weights that do
            not fit, for whole numbers that differ, for an `out` that exists or cannot be written, and a full disk;
            nothing is written.
    """
    paths, out = [Path(folder).expanduser() for folder in folders], Path(out).expanduser()
    shares = _shares(paths, weights)
    if out.exists():
        raise UserError(f"output folder {out} exists; choose another with -o, or remove it")
    checkpoints = [_Checkpoint(path) for path in paths]
    for other in checkpoints[1:]:
        _check_same(checkpoints[0], other)
    check_target(out)
    with staged(out) as folder:
        for name in checkpoints[0].files:
            keys = [key for key, place in checkpoints[0].place.items() if place == name]
            save_file(
                {key: mean(key, [checkpoint.read(key) for checkpoint in checkpoints], shares) for key in keys},
                folder / name,
                checkpoints[0].readers[name].metadata(),
            )
        _copy(paths, shares, folder)
    return out


def mean(key: str, tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """The weighted mean in the tensors' own type: b + sum_i s_i (x_i - b), b the one that has the largest share.

    Where all are equal, or one has the whole share, it is exactly that; a share of 0 leaves a tensor out.

    Args:
        key: the tensors' name, for errors.
        tensors: of one shape and type.
        shares: one for each, that sum to 1.
    """
    counted = [pair for pair in zip(shares, tensors, strict=True) if pair[0]]
    base = max(counted, key=lambda pair: pair[0])[1]
    if not base.is_floating_point():
        if any(not torch.equal(base, other) for _, other in counted):
            raise UserError(f"tensor {key} holds whole numbers ({base.dtype}) that differ, which have no mean")
        return base
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    moved = torch.zeros_like(wide)
    for share, other in counted:
        other = other.to(wide.dtype)
        moved += torch.where(other == wide, 0.0, share * (other - wide))  # infinities that are equal do not move
    return torch.where(moved == 0, base, (wide + moved).to(base.dtype))


def _shares(paths: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if len(paths) < 2:
        raise UserError(f"merging takes two or more checkpoints, got {len(paths)}")
    places = [path.resolve() for path in paths]
    if twice := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{twice[0]} is given {len(twice)} times; name each checkpoint once, and count it by `weights`")
    if weights is None:
        return [1 / len(paths)] * len(paths)
    if len(weights) != len(paths):
        raise UserError(f"{len(paths)} checkpoints need as many weights, got {len(weights)}: {_written(weights)}")
    outside = [weight for weight in weights if not 0 <= weight <= 1]
    if outside or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        what = f"{outside[0]:g} does not" if outside else f"they sum to {sum(weights):g}"
        raise UserError(
            f"weights {_written(weights)} must lie from 0 to 1 and sum to 1, and {what}; leave them out for equal ones"
        )
    return list(weights)


def _check_same(first: _Checkpoint, other: _Checkpoint) -> None:
    where = f"{first.folder} and {other.folder}"
    configs = [json.loads((each.folder / "config.json").read_text(encoding="utf-8")) for each in (first, other)]
    if changed := {k: v for k, v in differences(*configs).items() if k not in VOLATILE}:
        raise UserError(
            f"{where} differ in their configuration, {_listed(changed)}; only models of one kind have a mean"
        )
    if apart := sorted(first.place.keys() ^ other.place.keys()):
        raise UserError(
            f"{where} hold different tensors: {len(apart)} are in one alone, such as {apart[0]}; only models of one "
            "kind have a mean"
        )
    if clash := _clash(first.folder, other.folder):
        raise UserError(
            f"{where} have different vocabularies: token {clash[0]} is {clash[1]!r} in one and {clash[2]!r} in the "
            "other, so rows of their embeddings have no mean; take models with the same tokenizer"
        )
    for key in first.place:
        if (a := first.kind(key)) != (b := other.kind(key)):
            raise UserError(
                f"{where} differ in tensor {key}: {a[1]} {a[0]} and {b[1]} {b[0]}; convert or export them alike first"
            )


def _clash(one: Path, other: Path) -> tuple[int, str, str] | None:
    """The first number that stands for other tokens in the second vocabulary, and both; not those of one alone."""
    a, b = _vocabulary(one), _vocabulary(other)
    return next(((i, a[i], b[i]) for i in sorted(a.keys() & b.keys()) if a[i] != b[i]), None)


def _vocabulary(folder: Path) -> dict[int, str]:
    """Token by number, of a tokenizer.json; empty where there is none, or one of another form."""
    file = folder / "tokenizer.json"
    try:
        found = json.loads(read_text(file)) if file.is_file() else {}
        vocab = found.get("model", {}).get("vocab", {})
        pairs = vocab.items() if isinstance(vocab, dict) else ((piece[0], i) for i, piece in enumerate(vocab))
        added = {token["id"]: token["content"] for token in found.get("added_tokens", [])}
        return {number: token for token, number in pairs} | added
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged ({error!r}); copy or download it again") from error


def _copy(paths: Sequence[Path], shares: Sequence[float], folder: Path) -> None:
    stale = {INDEX} if weight_files(paths[0]) == [SINGLE] else set()  # of shards that are not read, nor written
    for path in paths[0].iterdir():
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in stale and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    said = [f"{share:g} of {path.name}" for share, path in zip(shares, paths, strict=True)]
    recipes = [recipe_in(path) for path in paths]
    for path, recipe in zip(paths[1:], recipes[1:], strict=True):
        if recipes[0] is not None and recipe is not None and (changed := differences(recipes[0], recipe)):
            said.append(f"the recipe of {path.name} differs in {_listed(changed)}")
    if (card := folder / "README.md").is_file() or recipes[0] is not None:
        text = read_text(card) if card.is_file() else ""
        note = "\n".join(f"- {line}" for line in said)
        about = f"The weights are an average; what is said above was measured on {paths[0].name} alone."
        card.write_text(f"{text.rstrip()}\n\n## Merged\n\n{about}\n\n{note}\n".lstrip(), encoding="utf-8")
    if recipes[0] is not None:
        text = read_text(folder / "recipe.yaml")
        note = "".join(f"# {line}\n" for line in ("Recipe of the first of the checkpoints that were averaged:", *said))
        (folder / "recipe.yaml").write_text(note + text, encoding="utf-8")


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    shown = [f"{key} ({one!r}, {other!r})" for key, (one, other) in list(changed.items())[:5]]
    return ", ".join(shown) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def _written(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)
