"""Training data: documents of any source, tokenised once into packed rows on disk.

`prepare(config, tokenizer, cache_dir=...)` returns a `PackedDataset`, from the cache if the same data was prepared
before. `read_tokens` gives the plain tokens of a source for evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from linearize.data.config import DataConfig
from linearize.data.encoding import Document, tokenized
from linearize.data.packed import TENSORS, PackedDataset
from linearize.data.packing import Row, pack, pad_each, with_recall
from linearize.data.preference import pair_rows
from linearize.data.sources import open_source
from linearize.errors import UserError, disk_full
from linearize.progress import bar

_LAYOUT = 3
_SHARD_TOKENS = 1 << 23


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, cache_dir: Path | None = None) -> PackedDataset:
    """Tokenise and pack `config`'s documents below `cache_dir`, or reuse what an earlier call made there.

    The default `cache_dir` is `linearize` in the Hugging Face home (`HF_HOME`).

    Reused if configuration, tokenizer content, and size and time of local files or the commit of a Hub
    dataset are the same (the commit of a stream is not known: give `revision`). Processes of one machine may
    call this together: one works, the others wait. A killed call leaves nothing that is read.

    Raises:
        UserError: when the data cannot be found, read or written, has no usable column, or fills no sequence.
    """
    cache_dir = Path(cache_dir or Path(HF_HOME) / "linearize")
    safe = f"finished data sets in {cache_dir} are complete"
    with disk_full(cache_dir, safe):
        cache_dir.mkdir(parents=True, exist_ok=True)
    rows, origin = open_source(config, cache_dir / "sources")
    key = _key(config, tokenizer, origin)
    folder, partial = cache_dir / key, cache_dir / f"{key}.partial"
    with FileLock(cache_dir / f"{key}.lock"):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            try:
                with disk_full(cache_dir, safe):
                    partial.mkdir()
                    _write(config, tokenizer, rows, partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            os.replace(partial, folder)
    return PackedDataset(folder)


def read_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    *,
    name: str | None = None,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Tokens `[N]` int64 of a source's documents in their order, laid end to end; at most `max_tokens`.

    Raises:
        UserError: when the data cannot be found or read, or has no usable column or no text.
    """
    return tokens_of(DataConfig(source=source, name=name, split=split), tokenizer, max_tokens=max_tokens)


def tokens_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None) -> torch.Tensor:
    """As `read_tokens`, for a source that needs more said about it, such as its text column."""
    if config.item_rows > 1:
        raise UserError(f"data.source={config.source!r} holds pairs of replies (data.format=preference), not texts")
    eos = tokenizer.eos_token_id is not None
    config = config.model_copy(update={"shuffle": False, "eos_between_documents": eos})
    rows, _ = open_source(config, None)
    parts: list[np.ndarray] = []
    total = 0
    for document in tokenized(rows, config, tokenizer):
        parts.append(document.ids)
        total += len(document.ids)
        if max_tokens is not None and total >= max_tokens:
            break
    if not parts:
        raise UserError(_too_little(config, {"documents": 0, "tokens": 0}))
    return torch.from_numpy(np.concatenate(parts)).long()[:max_tokens]


def _key(config: DataConfig, tokenizer: PreTrainedTokenizerBase, origin: list) -> str:
    if tokenizer.is_fast:
        # padding and truncation are settings of the last call, not content
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    else:
        state = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
    content = [_LAYOUT, config.model_dump(), origin, state, tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _write(config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: Any, folder: Path) -> None:
    """Write shards and, last, meta.json into `folder`."""
    counter: Counter[str] = Counter(documents=0, tokens=0)
    tokens = 0
    content = hashlib.sha256()
    shards: list[str] = []
    pending: list[Row] = []
    predicts = False
    for item in _items(config, tokenizer, rows, counter):
        real = sum(row.length for row in item)
        if config.max_tokens is not None and tokens and tokens + real > config.max_tokens:
            break
        tokens += real
        pending += item
        predicts = predicts or any(row.trained.any() for row in item)
        for *arrays, n in item:
            content.update(b"".join(array.tobytes() for array in arrays) + int(n).to_bytes(8, "little"))
        if len(pending) * config.seq_len >= _SHARD_TOKENS:
            shards.append(_save(pending, folder, len(shards)))
            pending = []
    if pending:
        shards.append(_save(pending, folder, len(shards)))
    if not shards:
        raise UserError(_too_little(config, counter))
    if not predicts:
        why = "no row has a reply to a prompt there" if config.completion_only else "all documents are single tokens"
        raise UserError(
            f"data.source={config.source!r} has nothing to predict within data.seq_len={config.seq_len}: {why}; choose "
            f"other data{', or set data.completion_only=false' * config.completion_only}"
        )
    meta = {"seq_len": config.seq_len, "shuffle": config.shuffle, "tokens": tokens, "shards": shards}
    meta |= {"item_rows": config.item_rows, "config": config.model_dump(), **counter, "tokens": tokens}
    meta["content"] = content.hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _items(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: Any, counter: Counter[str]
) -> Iterator[tuple[Row, ...]]:
    """Rows that belong together, in the order of the data."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if config.item_rows > 1:
        yield from pair_rows(rows, config, tokenizer, pad, counter)
        return
    documents = _counted(tokenized(rows, config, tokenizer), counter, config)
    packed = pack(documents, config.seq_len) if config.packing else pad_each(documents, config.seq_len, pad)
    if config.recall_fraction:
        packed = with_recall(packed, config.recall_fraction, config.seq_len, tokenizer, config.seed)
    yield from ((row,) for row in packed)


def _counted(documents: Iterator[Document], counter: Counter[str], config: DataConfig) -> Iterator[Document]:
    with bar("tokenising", unit="tok", total=config.max_tokens, anywhere=True) as shown:
        for document in documents:
            counter["documents"] += 1
            counter["tokens"] += len(document.ids)
            shown.update(len(document.ids))
            yield document


def _save(rows: list[Row], folder: Path, number: int) -> str:
    *columns, lengths = zip(*rows, strict=True)
    arrays = (*map(np.stack, columns), np.asarray(lengths, np.int32))
    tensors = {name: torch.from_numpy(array) for name, array in zip(TENSORS, arrays, strict=True)}
    name = f"shard-{number:05d}.safetensors"
    save_file(tensors, folder / name)
    with open(folder / name, "rb") as file:
        os.fsync(file.fileno())
    return name


def _too_little(config: DataConfig, counter: Mapping[str, int]) -> str:
    what = f"data.source={config.source!r} (split {config.split!r})"
    if not counter["tokens"]:
        return f"{what} has no text: all documents are empty; choose other data or another data.text_column"
    return (
        f"{what} has {counter['tokens']:,} tokens in {counter['documents']:,} documents, fewer than one "
        f"sequence of data.seq_len={config.seq_len}; lower data.seq_len, add data, or set data.packing=false"
    )
