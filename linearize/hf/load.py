"""Loads a converted checkpoint, or any Hugging Face causal LM, and says plainly what is wrong when it cannot.

`load(path)` returns the model in eval mode and its tokenizer. Weights are read from safetensors only, never
from pickles.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from linearize.errors import UserError
from linearize.families.base import Family
from linearize.hf.auto import register, trusting
from linearize.hf.folder import ADAPTER, check_folder, check_weights, weight_files
from linearize.hub.online import cache_if_unreachable, endpoint
from linearize.registry import known_family

logger = logging.getLogger(__name__)


def load(
    path_or_repo: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        path_or_repo: a local folder, or a repository name on the hub.
        dtype: "auto" (what the checkpoint says) or a torch dtype, by name or object. Position embeddings stay
            float32.
        device: where the weights go, loaded there directly; None is the CPU.
        trust_remote_code: run code of the repository, for architectures that transformers does not have.
            Converted checkpoints do not need it, unless their mixer is a `module:Class` of your own that is not
            imported yet.
        revision: branch, tag or commit of a hub repository.
        attn_implementation: kernel of the softmax layers, as transformers names it. When None its choice, but never
            one that leaves out what the configuration asks for.

    Returns:
        (model, tokenizer); a checkpoint with an `adapter` folder gives a `PeftModel`.

    Raises:
        UserError: for a folder or repository that is missing, unreachable, incomplete or damaged, and for a
            mixer or family that this installation does not have.
    """
    with _asking(path_or_repo):
        return _load(path_or_repo, dtype, device, trust_remote_code, revision, attn_implementation)


def _load(
    path_or_repo: str | Path,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    trust_remote_code: bool,
    revision: str | None,
    attn_implementation: str | None,
) -> tuple[Any, Any]:
    source = _source(path_or_repo)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    config = load_config(path_or_repo, **options)
    if _is_local(path_or_repo):
        for name in weight_files(Path(source)):
            check_weights(Path(source) / name)
    if attn_implementation is None and getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        attn_implementation = "eager"  # sdpa, which transformers 5.17 takes by itself, does not cap logits
    loader: Any = getattr(transformers, _auto_class(config))
    tokenizer = _tokenizer(source, **options)
    with trusting(trust_remote_code), _fitting(source):
        model, report = loader.from_pretrained(
            source,
            config=config,
            dtype=_dtype(dtype),
            device_map=None if device is None else {"": torch.device(device)},
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    _check_complete(source, config, type(model), report)
    return _with_adapter(model.eval(), source, revision), tokenizer


def _tokenizer(source: str, **options: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what transformers makes of damaged files
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{source} has no tokenizer that loads ({type(error).__name__}: {' '.join(str(error).split())}); see to "
            "its tokenizer.json and tokenizer_config.json, or copy or download them again"
        ) from error


@contextmanager
def _fitting(source: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"{source} has tensors of other sizes than its config.json says (listed above); the weights and the "
            "configuration do not belong together"
        ) from error


def _auto_class(config: Any) -> str:
    """Name of the Auto class that loads this model: what its family says, a causal LM where there is no family."""
    return (known_family(config) or Family).auto_class


def load_processor(path_or_repo: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """What turns a vision-language model's text and images into tensors; its tokenizer where there is nothing else.

    Raises:
        UserError: when its files, or a package that it needs, are missing.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        with nullcontext() if _is_local(path_or_repo) else cache_if_unreachable():
            return AutoProcessor.from_pretrained(_source(path_or_repo), **options)
    except (OSError, ImportError) as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise UserError(
            f"{path_or_repo} has no processor that loads: {reason} A model of images is exported with one; add its "
            "files (such as preprocessor_config.json) to the folder, or install what is missing (often torchvision)"
        ) from error


def load_config(path_or_repo: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Only the configuration of a model; arguments and errors as `load`."""
    register()
    source = _source(path_or_repo)
    if _is_local(path_or_repo):
        check_folder(Path(source))
    with _asking(path_or_repo):
        try:
            return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the configuration of {source} cannot be read: {' '.join(str(error).split())}") from error


def load_tokenizer(path_or_repo: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Only the tokenizer of a model; arguments and errors as `load`."""
    with _asking(path_or_repo):
        return _tokenizer(_source(path_or_repo), trust_remote_code=trust_remote_code, revision=revision)


@contextmanager
def _asking(path_or_repo: str | Path) -> Iterator[None]:
    """Explains what goes wrong while a model's files are read; those of a silent hub come from the local cache."""
    source = _source(path_or_repo)
    with nullcontext() if _is_local(path_or_repo) else cache_if_unreachable() as silence:
        try:
            yield
        except OSError as error:
            raise UserError(_unreachable(source, error, silence)) from error


def _source(path_or_repo: str | Path) -> str:
    return str(Path(path_or_repo).expanduser()) if _is_local(path_or_repo) else str(path_or_repo)


def _is_local(path_or_repo: str | Path) -> bool:
    text = str(path_or_repo)
    looks = isinstance(path_or_repo, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1
    return Path(text).expanduser().exists() or (looks and os.sep in text)


def _check_complete(source: str, config: Any, cls: type, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        own = ", ".join(config.architectures or [])
        reason = "the weights and the configuration do not belong together"
        if own and own != cls.__name__:
            reason = f"it was saved as {own}, which has no such part; give a checkpoint of {cls.__name__}"
        raise UserError(
            f"{source} lacks {len(missing)} tensors that a {cls.__name__} needs, such as {missing[0]}; {reason}"
        )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}; known: auto, bfloat16, float16, float32")
    return found


def _unreachable(source: str, error: OSError, silence: str | None) -> str:
    if _is_local(source):
        return f"cannot load {source}: {error}"
    if silence is not None:
        return (
            f"cannot load {source!r}: no such folder here, the hub at {endpoint()} does not answer ({silence}), and "
            "the local cache lacks it, or parts of it. Check the network (behind a proxy, HTTPS_PROXY), or give the "
            "path of a local copy; once all of it is cached, HF_HUB_OFFLINE=1 asks nobody"
        )
    reason = _refusal(error) or str(error).splitlines()[0].rstrip(".")
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set and it is not in the local cache"
    return (
        f"cannot load {source!r}: no such folder here, and as a hub repository: {reason}. Check the name and "
        "the network (and `hf auth login` for a gated one), or give the path of a local copy"
    )


def _refusal(error: BaseException | None) -> str | None:
    """What the hub's own error says, whatever transformers made of it."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return "it is gated, and the token here has no access; ask for it on the model's page"
        if isinstance(error, RevisionNotFoundError):
            return "it has no such revision"
        if isinstance(error, RepositoryNotFoundError):
            return "there is none of this name, or it is private and the token here may not see it"
        error = error.__cause__ or error.__context__
    return None


def _with_adapter(model: Any, source: str, revision: str | None) -> Any:
    name = f"{ADAPTER}/adapter_config.json"
    if _is_local(source):
        there = (Path(source) / name).is_file()
    else:
        there = getattr(model.config, "linearize", None) is not None and hub_file(source, name, revision) is not None
    if not there:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, source, subfolder=ADAPTER, revision=revision).eval()


def hub_file(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a hub repository, in the local cache; None where the repository has no such file.

    None, with a warning, also stands for a file that cannot be asked for now and never was, as offline.

    Raises:
        UserError: for a repository that is missing, or that the token may not see.
    """
    with _asking(repo):
        found = cached_file(repo, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None and try_to_load_from_cache(repo, name, revision=revision) is not _CACHED_NO_EXIST:
        logger.warning("%s: not known whether it has %s, because the hub was not reached; going on without", repo, name)
    return None if found is None else Path(found)
