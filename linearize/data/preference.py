"""Preference pairs: two replies to one prompt, of which the first was preferred, as two padded rows.

A row of the source has columns `chosen` and `rejected`, and may have `prompt`:

- texts with a `prompt` text; without one, dialogues of Anthropic's HH-RLHF (arXiv:2204.05862), whose prompt is what
  both share up to their last `Assistant:`;
- lists of messages that begin alike and end with one reply each (UltraFeedback, binarized), after those of `prompt`
  where that is a list of messages too.

Both replies are kept whole and see the same prompt: where the longer one would not fit, the prompt is cut on the left,
and where that leaves nothing of the prompt, the pair is dropped. So are pairs without two different replies to one
prompt. What was dropped is counted and told.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.data.config import DataConfig
from linearize.data.encoding import as_turn, check_text, check_turns, render, token_ids
from linearize.data.packing import Row
from linearize.data.places import BadRow
from linearize.data.sources import placed
from linearize.errors import UserError
from linearize.evals.recall import alike, leading_bos
from linearize.progress import bar

_LOG = logging.getLogger(__name__)
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
Tokens = tuple[list[int], list[int], list[int]]
"""Token ids of the prompt, of the chosen reply, and of the rejected one."""


def check_pairs(row: Mapping[str, Any], config: DataConfig) -> None:
    """Raise a UserError for a row without the columns of pairs."""
    if not {"chosen", "rejected"} <= set(row):
        raise UserError(
            f"data.source={config.source!r} has no pairs: data.format=preference needs columns chosen and rejected, "
            f"and it has {', '.join(row) or 'no rows'}; choose other data or another data.format"
        )


def pair_rows(
    rows: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase, pad: int, counter: Counter[str]
) -> Iterator[tuple[Row, Row]]:
    """The chosen and the rejected row of each pair, padded on the right with `pad`; only replies train.

    Args:
        rows: of the source, in order.
        config: a preference config.
        tokenizer: whose chat template renders messages.
        pad: token id.
        counter: counts "documents" (pairs) and "tokens", and pairs dropped as "unclear" or "long".

    Raises:
        UserError: for rows without the columns, a tokenizer that does not fit, or no pair that can be used.
    """
    check_pairs(next(iter(rows.take(1)), {}), config)
    if config.eos_between_documents and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; set data.eos_between_documents=false")
    bos = leading_bos(tokenizer)
    for row in _counted(rows, config):
        tokens = _tokens(row, config, tokenizer)
        fitting = None if tokens is None else fitted(tokens, config.seq_len, bos)
        if fitting is None:
            counter["unclear" if tokens is None else "long"] += 1
            continue
        prompt, *replies = fitting
        counter["documents"] += 1
        counter["tokens"] += sum(len(prompt) + len(reply) for reply in replies)
        chosen, rejected = (_row(prompt, reply, config.seq_len, pad) for reply in replies)
        yield chosen, rejected
    dropped = (
        f"{counter['long']} whose longer reply leaves no room for the prompt in seq_len={config.seq_len}, "
        f"{counter['unclear']} without one prompt and two different replies to it"
    )
    if not counter["documents"]:
        raise UserError(
            f"data.source={config.source!r} has no usable pair: {dropped}; raise seq_len or change the data"
        )
    if counter["long"] or counter["unclear"]:
        _LOG.info("%d pairs of %s dropped: %s", counter["long"] + counter["unclear"], config.source, dropped)


def check_pair(row: Mapping[str, Any]) -> None:
    """Raise a BadRow where the replies or the prompt are neither texts nor messages; null may stand there."""
    prompt, *replies = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    for name, reply in zip(("chosen", "rejected"), replies, strict=True):
        if not isinstance(reply, str | list | None):
            raise BadRow(f"{name} is neither a text nor a list of messages, but {reply!r:.80}")
    if all(replies) and isinstance(replies[0], str) != isinstance(replies[1], str):
        raise BadRow("of chosen and rejected one is a text, and the other a list of messages")
    if isinstance(prompt, list) and not isinstance(replies[0], str):
        check_turns(prompt, "prompt")
    else:
        check_text(prompt, "prompt")
    for reply in replies:
        if isinstance(reply, list):
            check_turns(reply, "chosen or rejected")


def _counted(rows: Any, config: DataConfig) -> Iterator[dict[str, Any]]:
    total = len(rows) if hasattr(rows, "__len__") else None  # of a stream nobody knows
    with bar("tokenising", unit="pair", total=total, anywhere=True) as shown, placed(config, check_pair):
        for row in rows:
            check_pair(row)
            yield row
            shown.update(1)


def fitted(tokens: Tokens, seq_len: int, bos: list[int]) -> Tokens | None:
    """The pair with its prompt cut on the left, after the beginning-of-sequence token, so that both rows fit."""
    prompt, chosen, rejected = tokens
    room = seq_len - max(len(chosen), len(rejected))
    if len(prompt) > room:
        kept = bos if bos and prompt[: len(bos)] == bos else []
        if room <= len(kept):
            return None
        prompt = [*kept, *prompt[len(prompt) - room + len(kept) :]]
    return (prompt, chosen, rejected) if prompt else None


def _tokens(row: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    """None for a row that holds no two different replies to one prompt."""
    if not row["chosen"] or not row["rejected"]:
        return None
    read = _of_texts if isinstance(row["chosen"], str) else _of_messages
    tokens = read(row, tokenizer)
    if tokens is None or not tokens[1] or not tokens[2] or tokens[1] == tokens[2]:
        return None
    if config.eos_between_documents:
        for reply in tokens[1:]:
            if reply[-1] != tokenizer.eos_token_id:
                reply.append(tokenizer.eos_token_id)
    return tokens


def _of_texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    prompt, replies = row.get("prompt"), [row["chosen"], row["rejected"]]
    if not prompt:
        shared = replies[0][: alike(*replies)]
        if _ASSISTANT not in shared:
            return None
        prompt = shared[: shared.rindex(_ASSISTANT) + len(_ASSISTANT)]
        replies = [reply[len(prompt) :] for reply in replies]
        if any(_HUMAN in reply for reply in replies):  # the dialogues parted before their last reply
            return None
    chosen, rejected = token_ids(tokenizer, replies, special=False)
    return token_ids(tokenizer, [prompt])[0], chosen, rejected


def _of_messages(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    given = row.get("prompt")
    before = [as_turn(message) for message in given] if isinstance(given, list) else []
    chosen, rejected = ([*before, *(as_turn(message) for message in row[key])] for key in ("chosen", "rejected"))
    prompt, replies = chosen[:-1], [chosen[-1], rejected[-1]]
    if prompt != rejected[:-1] or any(reply["role"] != "assistant" for reply in replies):
        return None
    if not prompt and isinstance(given, str):
        prompt = [{"role": "user", "content": given}]
    if not prompt:
        return None
    start = render(prompt, tokenizer, reply=True)
    whole = [render([*prompt, reply], tokenizer) for reply in replies]
    if any(ids[: len(start)] != start for ids in whole):
        raise UserError(
            "the tokenizer's chat template rewrites earlier turns, so replies cannot be told from prompts; use pairs "
            "of texts with a prompt column, or a tokenizer with another template"
        )
    return start, whole[0][len(start) :], whole[1][len(start) :]


def _row(prompt: list[int], reply: list[int], seq_len: int, pad: int) -> Row:
    row, n = Row.blank(seq_len, pad), len(prompt) + len(reply)
    row.ids[:n] = [*prompt, *reply]
    row.trained[len(prompt) : n] = True
    return row._replace(length=n)
