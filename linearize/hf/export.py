"""Writes a converted model as a Hugging Face folder that loads without this toolkit.

`export(model, tokenizer, folder)` writes weights, tokenizer and the code to load them; `export_adapter` keeps
a LoRA apart, in `folder/adapter`. A folder without `config.json` is not finished: that file always arrives
last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from linearize.errors import UserError, disk_full
from linearize.hf.folder import ADAPTER, is_bundled
from linearize.hf.native import native_model


def export(
    model: Any,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    max_shard_size: str = "5GB",
    extra_files: Mapping[str, str | bytes] | None = None,
    native: bool = False,
) -> Path:
    """Write a checkpoint, all of it or nothing.

    Args:
        model: a converted model (`linearize.hf.auto.linearized`), LoRA merged.
        tokenizer: what its `save_pretrained` writes goes beside the weights; None writes no tokenizer.
        out_dir: created with its parents. What an earlier export left there is replaced, all else stays.
        max_shard_size: largest safetensors file, say "5GB".
        extra_files: file name -> content, say a recipe, a model card and a licence.
        native: write the architecture of transformers that the model is, see `linearize.hf.native`.

    Returns:
        `out_dir` as a Path.

    Raises:
        UserError: for a model that is not a converted one or still has LoRA layers, mixer code that cannot be
            copied, a full disk, and a native export of what transformers does not have.
    """
    out = Path(out_dir)
    _check_converted(model)
    lora = [name for name, _ in model.named_parameters() if "lora_" in name]
    if lora:
        raise UserError(f"the model has LoRA layers, such as {lora[0]}; merge them or use `export_adapter`")
    if native:
        model = native_model(model)
    with staged(out) as folder:
        _write(model, tokenizer, folder, max_shard_size, extra_files or {})
    return out


def export_adapter(
    model: Any,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    max_shard_size: str = "5GB",
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a `PeftModel` as a checkpoint of its base plus `adapter/`, both or nothing.

    `PeftModel.from_pretrained(base, out_dir / "adapter")` gives the same logits as `model` did. The LoRA
    layers are taken out of `model` on the way. Arguments and errors are those of `export`.
    """
    out = Path(out_dir)
    _check_converted(model)
    for peft_config in model.peft_config.values():
        peft_config.base_model_name_or_path = None  # it lies in the folder above, wherever that is moved
    with staged(out) as folder:
        model.save_pretrained(folder / ADAPTER, safe_serialization=True)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # a template without content
        _write(model.unload(), tokenizer, folder, max_shard_size, extra_files or {})
    return out


def _check_converted(model: Any) -> None:
    if getattr(model.config, "linearize", None) is None:
        raise UserError(f"{type(model).__name__} is not a converted model; convert it before exporting it")


def _write(
    model: Any, tokenizer: Any, folder: Path, max_shard_size: str, extra_files: Mapping[str, str | bytes]
) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if getattr(model.config, "linearize", None) is not None:  # others have transformers' own names, which it translates
        _check_written(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, content in extra_files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    mode = (folder / "config.json").stat().st_mode  # safetensors lets the owner alone read what it writes
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def _check_written(model: Any, folder: Path) -> None:
    """Raise a RuntimeError unless the files hold every tensor of the model under its name or that of a tied one."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update(file.keys())
    held = model.state_dict()
    there = {held[name].data_ptr() for name in found & held.keys()}
    lost = [name for name, tensor in held.items() if name not in found and tensor.data_ptr() not in there]
    if lost or (strange := sorted(found - held.keys())):
        what = f"without {lost[0]}" if lost else f"with {strange[0]}, which it does not have"
        raise RuntimeError(f"transformers wrote {type(model).__name__} {what}; nothing has been exported")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write into; on success its files move to `out`, `config.json` last.

    It lies beside a new `out`, and inside one that exists, because that may be a mount point or a link to another
    file system, onto which nothing can be renamed. An interrupted export leaves the checkpoint in `out` as it was, or,
    within the last renames, without a `config.json`.
    """
    folder = out / ".partial" if out.exists() else out.parent / f".{out.name}.partial"
    with disk_full(out.parent, safe="no file in the target folder has been changed"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
            for path in folder.rglob("*"):
                _sync(path)
            _move(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    if not out.exists():
        os.rename(folder, out)
    else:
        (out / "config.json").unlink(missing_ok=True)
        _remove_earlier(out)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, out / path.name)
        _sync(out)
    _sync(out.parent)


def _remove_earlier(out: Path) -> None:
    """Remove what an earlier export wrote and this one might not overwrite, and nothing else."""
    if (out / ADAPTER / "adapter_config.json").is_file():
        shutil.rmtree(out / ADAPTER)
    shards = [*out.glob("model-?????-of-?????.safetensors"), out / "model.safetensors.index.json"]
    code = [path for path in out.glob("*.py") if is_bundled(path)]
    for path in (out / "model.safetensors", *shards, *code):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
