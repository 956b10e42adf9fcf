"""Where documents come from: the rows of the demo text, local files or a Hub dataset, turned into tokens.

`open_source` loads rows through `datasets`; `tokenized` yields one `Document` per row. What a row means
(plain text, chat, instruction) is read from its columns unless the configuration says so. `linearize.data`
packs the result.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from linearize import demo
from linearize.data.config import DataConfig
from linearize.errors import UserError, did_you_mean, disk_full
from linearize.evals.recall import leading_bos

_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "dev"), "validation")
_CHAT_COLUMNS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
_BATCH = 64
_SHUFFLE_BUFFER = 10_000

# Prompts of Stanford Alpaca (Taori et al. 2023), the format of the LoLCATs and Liger training data.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Document:
    """One document: token `ids` `[n]` int32 and `trained` `[n]` bool, false for tokens that are no target."""

    ids: np.ndarray
    trained: np.ndarray


def open_source(config: DataConfig, folder: Path | None) -> tuple[Any, list]:
    """The rows of `config.source`, shuffled and limited as configured, and a fingerprint of their origin.

    `folder` keeps the Arrow copies of local files; without one, and for Hub datasets, `datasets` uses its
    own.

    Raises:
        UserError: for a path that does not exist, a dataset that cannot be reached, or an unknown split.
    """
    import datasets

    split, bracket, rest = config.split.partition("[")
    files = [demo.text_path(split)] if config.source == "demo" else _local_files(config.source, split)
    cache = folder if files and folder else Path(datasets.config.HF_DATASETS_CACHE)
    try:
        with disk_full(cache, safe="nothing was changed"):
            rows, origin = _open_files(files, bracket + rest, cache) if files else _open_hub(config)
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_why_not(config, bool(files), error)) from error
    if config.shuffle:
        extra = {"buffer_size": _SHUFFLE_BUFFER} if isinstance(rows, datasets.IterableDataset) else {}
        rows = rows.shuffle(seed=config.seed, **extra)
    if config.limit_documents is not None:
        rows = rows.take(config.limit_documents)
    return rows, origin


def check_source(config: DataConfig) -> None:
    """Raise a UserError for local files that are not there, or of which none belongs to the split; reads none."""
    if config.source != "demo":
        _local_files(config.source, config.split.partition("[")[0])


def tokenized(rows: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Documents of `rows` in order, none empty, each ending with the end-of-sequence token if configured.

    Raises:
        UserError: when no column fits the format, or there are no rows.
    """
    first = next(iter(rows.take(1)), None)
    if first is None:
        raise UserError(f"data.source={config.source!r} (split {config.split!r}) has no rows")
    encode = _encoder(first, config, tokenizer)
    eos = tokenizer.eos_token_id
    if config.eos_between_documents and eos is None:
        raise UserError("the tokenizer has no end-of-sequence token; set data.eos_between_documents=false")
    for batch in rows.iter(batch_size=_BATCH):
        for ids, prompt in encode(batch):
            if not ids:
                continue
            if config.eos_between_documents and ids[-1] != eos:
                ids, prompt = [*ids, eos], [*prompt, prompt[-1]]  # what ends with a prompt is not to be ended there
            trained = ~np.asarray(prompt, bool) if config.completion_only else np.ones(len(ids), bool)
            yield Document(np.asarray(ids, dtype=np.int32), trained)


def _local_files(source: str, split: str) -> list[Path]:
    """Files of one kind that a local `source` has for `split`; none when `source` names a Hub dataset."""
    path = Path(source).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.suffix in _LOADERS]
    elif any(c in source for c in "*?["):
        pattern = str(path.relative_to(path.anchor))
        found = sorted(p for p in Path(path.anchor or ".").glob(pattern) if p.is_file())
    elif path.suffix in _LOADERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"data.source={source!r} does not exist (looked in {Path.cwd()})")
    else:
        return []
    kinds = {p.suffix for p in found}
    if len({_LOADERS.get(kind) for kind in kinds}) != 1 or not kinds <= set(_LOADERS):
        raise UserError(
            f"data.source={source!r} must name files of one kind; found {', '.join(sorted(kinds)) or 'none'}"
            f", known: {', '.join(_LOADERS)}"
        )
    return _of_split(found, split, source)


def _of_split(files: list[Path], split: str, source: str) -> list[Path]:
    """Files whose names contain the split as a word; the others, and a file named alone, are `train`."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", f"{file.parent.name} {file.stem}".lower())
        named = [_SPLITS[word] for word in words if word in _SPLITS] if len(files) > 1 else []
        groups.setdefault(named[-1] if named else "train", []).append(file)
    chosen = _SPLITS.get(split, split)
    if chosen not in groups:
        raise UserError(f"data.split={split!r} is not in data.source={source!r}{did_you_mean(split, groups)}")
    return groups[chosen]


def _open_files(files: list[Path], part: str, folder: Path) -> tuple[Any, list]:
    import datasets

    if not any(file.stat().st_size for file in files):
        raise UserError(f"data.source: {', '.join(map(str, files))} is empty; choose other data")
    options = {"sample_by": "document"} if files[0].suffix == ".txt" else {}
    rows = datasets.load_dataset(
        _LOADERS[files[0].suffix],
        data_files=[glob.escape(str(file.resolve())) for file in files],  # patterns, to datasets
        split=f"train{part}",
        cache_dir=str(folder),
        **options,
    )
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return rows, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _open_hub(config: DataConfig) -> tuple[Any, list]:
    import datasets

    rows = datasets.load_dataset(
        config.source, config.name, split=config.split, revision=config.revision, streaming=config.streaming
    )
    return rows, sorted(rows.info.download_checksums or {})  # its keys are URLs that hold the commit


def _why_not(config: DataConfig, local: bool, error: Exception) -> str:
    where = f"data.source={config.source!r}"
    cause = (f"{error.__cause__ or error}".splitlines() or [type(error).__name__])[0]
    if local:
        return f"cannot read {where}: {cause}; check that the files are what their names say"
    if "split" in str(error).lower():
        return f"data.split={config.split!r} of {where}: {error}"
    return (
        f"cannot load {where} from the Hub: {cause}. It is no local path either. Check the name (and "
        "data.name), the network, and HF_HUB_OFFLINE, which allows only what is already in the cache; or "
        "download the files and set data.source=path/to/*.parquet, or use data.source=demo"
    )


Encoded = list[tuple[list[int], list[bool]]]
"""Per document: token ids, and for each whether it belongs to the prompt (true) or the completion (false)."""


def _encoder(
    row: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Callable[[dict[str, list]], Encoded]:
    column, kind = _column(row, config)
    if config.completion_only and kind == "text":
        raise UserError("data.completion_only=true needs chat or instruction data; this source is plain text")
    if kind == "chat":
        return lambda batch: [_encode_chat(messages, config, tokenizer) for messages in batch[column] if messages]
    if kind == "instruction":
        return lambda batch: _encode_instructions(batch, tokenizer)

    def encode_text(batch: dict[str, list]) -> Encoded:
        texts = [text for text in batch[column] if text and not text.isspace()]
        return [(ids, [False] * len(ids)) for ids in token_ids(tokenizer, texts)] if texts else []

    return encode_text


def _column(row: dict[str, Any], config: DataConfig) -> tuple[str, str]:
    """Which column to read and what it holds: text, chat, or instruction (with its fixed columns)."""
    columns = list(row)
    wanted = config.text_column
    if wanted is not None and wanted not in columns:
        raise UserError(f"data.text_column={wanted!r} is not a column{did_you_mean(wanted, columns)}")
    text = wanted or "text"
    if config.format in ("auto", "text") and text in columns and isinstance(row[text], str | None):
        return text, "text"
    chat = wanted or next((name for name in _CHAT_COLUMNS if name in columns), None)
    if config.format in ("auto", "chat") and chat and isinstance(row[chat], list):
        return chat, "chat"
    if config.format in ("auto", "instruction") and not wanted and {"instruction", "output"} <= set(columns):
        return "instruction", "instruction"
    raise UserError(
        f"data.source={config.source!r} has no column that fits data.format={config.format}; its columns are "
        f"{', '.join(columns)}. Name the one with the text: data.text_column=...; pairs chosen and rejected are "
        "data.format=preference"
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = True) -> list[list[int]]:
    # verbose=False: long documents are cut later, a warning that they exceed the context would mislead
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]


def _encode_instructions(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    inputs = batch.get("input") or [""] * len(batch["instruction"])
    rows = [row for row in zip(batch["instruction"], inputs, batch["output"], strict=True) if row[0] and row[2]]
    if not rows:
        return []
    prompts = [
        (_ALPACA_INPUT if context else _ALPACA).format(instruction=instruction, input=context)
        for instruction, context, _ in rows
    ]
    pairs = zip(
        token_ids(tokenizer, prompts), token_ids(tokenizer, [row[2] for row in rows], special=False), strict=True
    )
    return [(prompt + output, [True] * len(prompt) + [False] * len(output)) for prompt, output in pairs]


def _encode_chat(
    messages: list[dict[str, str]], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation; what the assistant replies is completion, everything else prompt.

    So is what it says before anybody else: there is no prompt after which a template could begin that.
    """
    turns = [as_turn(message, config) for message in messages]
    ids = render(turns, tokenizer)
    if not config.completion_only:
        return ids, [False] * len(ids)
    prompt = [True] * len(ids)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i == 0:
            continue
        before, after = render(turns[:i], tokenizer, reply=True), render(turns[: i + 1], tokenizer)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise UserError(
                "the tokenizer's chat template rewrites earlier turns, so replies cannot be told from "
                "prompts; set data.completion_only=false"
            )
        prompt[len(before) : len(after)] = [False] * (len(after) - len(before))
    return ids, prompt


def as_turn(message: Any, config: DataConfig) -> dict[str, str]:
    """One message as `{"role": ..., "content": ...}`, from either of the two usual spellings."""
    role: Any = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
    if role is None:
        raise UserError(
            f"data.source={config.source!r} has a chat message without a role: {str(message)[:80]!r}; messages need "
            "role and content, or from and value. Choose another column with data.text_column=..., or other data"
        )
    content = message.get("content") or message.get("value") or ""
    return {"role": _ROLES.get(role, role), "content": content}


def render(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, reply: bool = False) -> list[int]:
    """Tokens of `turns` by the chat template, or of one `role: content` line each where there is none.

    Raises:
        UserError: for turns that the template refuses.
    """
    if tokenizer.chat_template:
        try:
            encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=reply, return_dict=True)
        except TemplateError as error:
            raise UserError(
                f"the tokenizer's chat template refuses a conversation ({error}): roles "
                f"{', '.join(turn['role'] for turn in turns)}, beginning {turns[0]['content'][:80]!r}; remove or "
                "change that row of the data, or take a tokenizer with another template"
            ) from error
        return encoded["input_ids"]
    lines = [part for turn in turns for part in (f"{turn['role']}:", f" {turn['content']}\n")]
    lines += ["assistant:"] if reply else []
    pieces = token_ids(tokenizer, lines, special=False) if lines else []
    return leading_bos(tokenizer) + [token for piece in pieces for token in piece]
