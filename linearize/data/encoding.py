"""What a row of a source means, and its tokens: plain text, a chat, or an instruction with its output.

The kind is read from the row's columns unless the configuration says it. `tokenized` yields one `Document` per row,
which `linearize.data.packing` lays into sequences; pairs of replies have a file of their own, `preference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from linearize.data.config import DataConfig
from linearize.data.places import BadRow
from linearize.data.sources import placed
from linearize.errors import UserError, did_you_mean
from linearize.evals.recall import leading_bos

_CHAT_COLUMNS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
_BATCH = 64

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


Encoded = list[tuple[list[int], list[bool]]]
"""Per document: token ids, and for each whether it belongs to the prompt (true) or the completion (false)."""


def tokenized(rows: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Documents of `rows` in order, none empty, each ending with the end-of-sequence token if configured.

    Raises:
        UserError: when no column fits the format, there are no rows, or one of them holds something else.
    """
    first = next(iter(rows.take(1)), None)
    if first is None:
        raise UserError(f"data.source={config.source!r} (split {config.split!r}) has no rows")
    column, kind = kind_of(first, config)
    encode = _encoder(column, kind, config, tokenizer)
    eos = tokenizer.eos_token_id
    if config.eos_between_documents and eos is None:
        raise UserError("the tokenizer has no end-of-sequence token; set data.eos_between_documents=false")
    with placed(config, lambda row: check_row(row, column, kind)):
        for batch in rows.iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                check_row(dict(zip(batch, values, strict=True)), column, kind)
            for ids, prompt in encode(batch):
                if not ids:
                    continue
                if config.eos_between_documents and ids[-1] != eos:
                    ids, prompt = [*ids, eos], [*prompt, prompt[-1]]  # what ends with a prompt is not to be ended there
                trained = ~np.asarray(prompt, bool) if config.completion_only else np.ones(len(ids), bool)
                yield Document(np.asarray(ids, dtype=np.int32), trained)


def _encoder(
    column: str, kind: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Callable[[dict[str, list]], Encoded]:
    if kind == "chat":
        return lambda batch: [_encode_chat(messages, config, tokenizer) for messages in batch[column] if messages]
    if kind == "instruction":
        return lambda batch: _encode_instructions(batch, tokenizer)

    def encode_text(batch: dict[str, list]) -> Encoded:
        texts = [text for text in batch[column] if text and not text.isspace()]
        return [(ids, [False] * len(ids)) for ids in token_ids(tokenizer, texts)] if texts else []

    return encode_text


def check_row(row: Mapping[str, Any], column: str, kind: str) -> None:
    """Raise a BadRow where a row, of the kind that the first one was, has something else than text where text belongs;
    nothing at all may stand there.
    """
    if kind == "chat":
        check_turns(row.get(column), column)
        return
    for name in (column,) if kind == "text" else ("instruction", "input", "output"):
        check_text(row.get(name), name)


def check_text(value: Any, name: str) -> None:
    """Raise a BadRow for what is neither a text nor null."""
    if not isinstance(value, str | None):
        raise BadRow(f"{name} is no text, but {value!r:.80}")


def check_turns(messages: Any, name: str) -> None:
    """Raise a BadRow for what is neither a list of messages nor null."""
    if not isinstance(messages, list | None):
        raise BadRow(f"{name} is no list of messages, but {messages!r:.80}")
    for message in messages or ():
        as_turn(message)


def kind_of(row: dict[str, Any], config: DataConfig) -> tuple[str, str]:
    """Which column to read and what it holds: text, chat, or instruction (with its fixed columns).

    Raises:
        UserError: where no column of the row fits `config`, or plain text has no replies to train on.
    """
    column, kind = _column(row, config)
    if config.completion_only and kind == "text":
        raise UserError("data.completion_only=true needs chat or instruction data; this source is plain text")
    return column, kind


def _column(row: dict[str, Any], config: DataConfig) -> tuple[str, str]:
    columns = list(row)
    wanted = config.text_column
    if wanted is not None and wanted not in columns:
        raise UserError(f"data.text_column={wanted!r} is not a column{did_you_mean(wanted, columns)}")
    text = wanted or "text"
    if config.format in ("auto", "text") and text in columns and isinstance(row[text], str | None):
        return text, "text"
    chat = wanted or next((name for name in _CHAT_COLUMNS if name in columns), None)
    if config.format in ("auto", "chat") and chat and isinstance(row[chat], list | None):
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
    turns = [as_turn(message) for message in messages]
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


def as_turn(message: Any) -> dict[str, str]:
    """One message as `{"role": ..., "content": ...}`, from either of the two usual spellings.

    A content in parts is joined, if all of them are texts.

    Raises:
        BadRow: for a message without a role, or whose content is no text.
    """
    role: Any = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise BadRow(
            f"a chat message without a role: {message!r:.80}; messages need role and content, or from and value"
        )
    content = message.get("content") or message.get("value") or ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"a chat message whose content is no text, but {content!r:.80}")
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
