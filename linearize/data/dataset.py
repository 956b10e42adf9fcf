"""Training data: documents of any source, tokenised once into packed rows on disk, read back memory-mapped.

`prepare(config, tokenizer, cache_dir=...)` returns a `PackedDataset`, from the cache if the same data was
prepared before. `batches` walks through it as a pure function of the step, so that a resumed run sees exactly
what it would have seen. `read_tokens` gives the plain tokens of a source for evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from linearize.data.config import DataConfig
from linearize.data.packing import Row, pack, pad_each, with_recall
from linearize.data.preference import pair_rows
from linearize.data.sources import Document, open_source, tokenized
from linearize.errors import UserError, disk_full
from linearize.ops.documents import positions

_LAYOUT = 2
_SHARD_TOKENS = 1 << 23
_TENSORS = ("input_ids", "documents", "trained", "lengths")


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
            self._shards = [{name: file.get_tensor(name) for name in _TENSORS} for file in files]
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
        """The items at `indices`: input_ids, labels, position_ids, maybe attention_mask, `[B, T]` int64.

        B is their number, of pairs twice that: chosen and rejected rows in turn.

        Labels follow HF: they stand at the index of their token, the loss shifts them. They are -100 on
        padding, on prompts if only completions train, and on the first token of every document, which nothing
        precedes. position_ids restart at 0 with every packed document; attention_mask is there only if a row
        is padded.
        """
        each = range(self.item_rows)
        rows = [self._row(int(index) * self.item_rows + part) for index in indices for part in each]
        ids, documents, trained, lengths = (torch.stack(part) for part in zip(*rows, strict=True))
        batch = {"input_ids": ids.long(), "labels": ids.long().masked_fill(~trained, -100)}
        batch["position_ids"] = positions(documents)[1]
        if bool((lengths < self.seq_len).any()):
            batch["attention_mask"] = (torch.arange(self.seq_len) < lengths[:, None]).long()
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
        return tuple(self._shards[shard][name][row] for name in _TENSORS)


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
    for item in _items(config, tokenizer, rows, counter):
        real = sum(row[3] for row in item)
        if config.max_tokens is not None and tokens and tokens + real > config.max_tokens:
            break
        tokens += real
        pending += item
        for *arrays, n in item:
            content.update(b"".join(array.tobytes() for array in arrays) + int(n).to_bytes(8, "little"))
        if len(pending) * config.seq_len >= _SHARD_TOKENS:
            shards.append(_save(pending, folder, len(shards)))
            pending = []
    if pending:
        shards.append(_save(pending, folder, len(shards)))
    if not shards:
        raise UserError(_too_little(config, counter))
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
    with tqdm(desc="tokenising", unit="tok", unit_scale=True, total=config.max_tokens) as bar:
        for document in documents:
            counter["documents"] += 1
            counter["tokens"] += len(document.ids)
            bar.update(len(document.ids))
            yield document


def _save(rows: list[Row], folder: Path, number: int) -> str:
    ids, documents, trained, lengths = zip(*rows, strict=True)
    arrays = (np.stack(ids), np.stack(documents), np.stack(trained), np.asarray(lengths, np.int32))
    tensors = {name: torch.from_numpy(array) for name, array in zip(_TENSORS, arrays, strict=True)}
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
