"""Which files of a checkpoint's folder are published: what loading it needs and what describes it, nothing else.

`contents(folder)` names them by an allow-list, so that training runs, optimizer states, pickles, dotfiles and tokens
that lie in the folder stay at home; it refuses a file with a token in its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from linearize.errors import UserError
from linearize.hf.folder import (
    ADAPTER,
    INDEX,
    SINGLE,
    check_folder,
    check_weights,
    is_bundled,
    is_of,
    recipe_in,
    weight_files,
)
from linearize.hub.licence import is_licence

ALLOWED = (
    "README.md",
    "recipe.yaml",
    "config.json",
    "generation_config.json",
    # Tokenizers and processors, as transformers names them.
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jin*",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Patterns of names at the top of a checkpoint, beside its weights, its own code and licences."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""Names of the parts of large checkpoints."""
REPORT = {"model", "student", "teacher", "settings", "environment"}
"""Keys of what `linearize evaluate --output` writes."""
TEXT_LIMIT = 64 * 2**20
"""Bytes up to which a file that holds no weights is searched for tokens."""
TOKEN = re.compile(
    rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-Fa-f]{2}))"
    rb"(?:(?:hf|api_org)_[A-Za-z0-9]{30,}|hf_(?:[a-z]+_+)+(?:[A-Za-z0-9]{30,}|eyJ[A-Za-z0-9]{10,}))"
)
"""Tokens of users (hf_), of organisations (api_org_), of OAuth (hf_oauth_) and for one repository (hf_jwt_): thirty
letters and digits or more after the prefix, or a JSON web token. What stands before is no part of a longer word, but
may be an escape of JSON or of an address."""


@dataclass(frozen=True)
class Contents:
    """What a push sends."""

    files: dict[str, Path]
    """Path in the repository -> file."""
    left_out: list[str]
    """Names at the top of the folder that stay at home; folders end with a slash."""
    reports: list[Path]
    """Those of `files` that are reports of `linearize evaluate`."""


def contents(folder: Path, *, adapter_only: bool = False, secrets: Iterable[str] = ()) -> Contents:
    """The files of the checkpoint in `folder`, or of its LoRA alone, which then lie at the top of the repository.

    Args:
        secrets: texts that no published file may contain, beside everything that looks like a token of the hub.

    Raises:
        UserError: for a folder that is no finished converted checkpoint, has damaged weights, has no adapter where only
            that is wanted, and for a file with a token in it.
    """
    check_folder(folder)
    if recipe_in(folder) is None and "linearize" not in _json(folder / "config.json"):
        raise UserError(
            f"{folder} is a Hugging Face model that linearize did not write; give the folder of a converted checkpoint"
        )
    weights = weight_files(folder)
    for name in weights:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names {name!r}, which is no safetensors file beside it; export it again")
        check_weights(folder / name)
    top = {path.name: path for path in sorted(folder.iterdir())}
    reports = [path for path in top.values() if _is_report(path, folder)]
    adapter = {name: folder / ADAPTER / name for name in ADAPTER_FILES if (folder / ADAPTER / name).is_file()}
    if adapter_only:
        if len(adapter) < len(ADAPTER_FILES):
            raise UserError(f"{folder} has no {ADAPTER}/ with a LoRA; push it whole, or convert with lora.merge: false")
        wanted = {name: path for name, path in top.items() if name in ("README.md", "recipe.yaml") or is_licence(name)}
        wanted = {name: path for name, path in wanted.items() if path.is_file()}
        files = {**wanted, **{path.name: path for path in reports}, **adapter}
    else:
        wanted = {name: path for name, path in top.items() if _is_wanted(path) or path in reports}
        index = [INDEX] if weights != ["model.safetensors"] else []
        files = {**wanted, **{name: folder / name for name in [*weights, *index]}}
        files |= {f"{ADAPTER}/{name}": path for name, path in adapter.items()}
    _check_links(files, folder)
    for name, path in files.items():
        if name.endswith(".json"):
            _check_object(path)
        _check_no_token(name, path, secrets)
    sent = {path.relative_to(folder).parts[0] for path in files.values()}
    left = [f"{name}/" if path.is_dir() else name for name, path in top.items() if name not in sent]
    return Contents(files, left, reports)


def is_weights(path: str) -> bool:
    """Whether a file of a repository is what an earlier push of a checkpoint or an adapter may have left there."""
    if path in (SINGLE, INDEX) or SHARD.fullmatch(path):
        return True
    return path.removeprefix(f"{ADAPTER}/") in ADAPTER_FILES


def _is_wanted(path: Path) -> bool:
    if not path.is_file() or path.name.startswith("."):
        return False
    if path.suffix == ".py":
        return is_bundled(path)
    return is_licence(path.name) or any(fnmatch(path.name, pattern) for pattern in ALLOWED)


def _is_report(path: Path, folder: Path) -> bool:
    """Whether a file is what `linearize evaluate` wrote on the model in `folder`, not on another one."""
    if path.suffix != ".json" or not path.is_file() or path.name.startswith(".") or _is_wanted(path):
        return False
    found = _json(path) if path.stat().st_size <= TEXT_LIMIT else {}
    return found.keys() >= REPORT and is_of(found, folder)


def _json(path: Path) -> dict:
    """The object in a JSON file; empty where it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_object(path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); convert or copy the checkpoint again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; convert or copy the checkpoint again")


def _check_links(files: Mapping[str, Path], folder: Path) -> None:
    """Refuse what is only a link to something that is not published, in the folder or outside."""
    root = folder.resolve()
    own = {root / path.relative_to(folder) for path in files.values()}
    for name, path in files.items():
        if (target := path.resolve()) not in own:
            where = "outside its folder" if not target.is_relative_to(root) else "that stays at home"
            raise UserError(
                f"{name} is a link to {target}, a file {where}; put a copy in its place if it may be published"
            )


def _check_no_token(name: str, path: Path, secrets: Iterable[str]) -> None:
    if path.suffix == ".safetensors" or path.stat().st_size > TEXT_LIMIT:
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see to its permissions, or remove it") from error
    if (line := token_line(data, secrets)) is not None:
        raise UserError(f"{name}, line {line}, has a token of the hub in it; remove it from {path}, and revoke it")


def token_line(data: bytes, secrets: Iterable[str] = ()) -> int | None:
    """The line of a text, from 1, that holds a token of the hub or one of `secrets`; None where there is none."""
    found = TOKEN.search(data)
    places = [found.start()] if found else [at for text in secrets if text and (at := data.find(text.encode())) >= 0]
    return data.count(b"\n", 0, places[0]) + 1 if places else None
