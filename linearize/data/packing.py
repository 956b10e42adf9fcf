"""Lays tokenised documents into rows of one length: packed end to end, or one document each with padding.

A row marks where documents begin, because nothing may be predicted, or remembered, across a boundary.
`linearize.data` writes the rows to disk; `with_recall` mixes synthetic recall documents among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from linearize.data.encoding import Document
from linearize.evals.recall import recall_document

Row = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""input_ids `[T]` int32, document number `[T]` int32, trained `[T]` bool, how many of the tokens are real."""

_MOST_FACTS = 8
_TOKENS_PER_FACT = 128


def pack(documents: Iterator[Document], seq_len: int) -> Iterator[Row]:
    """Lay documents end to end and cut every `seq_len` tokens; a rest shorter than that is dropped."""
    ids, number, trained = _empty(seq_len)
    fill = document = 0
    for source in documents:
        start = 0
        while start < len(source.ids):
            n = min(seq_len - fill, len(source.ids) - start)
            ids[fill : fill + n] = source.ids[start : start + n]
            trained[fill : fill + n] = source.trained[start : start + n]
            trained[fill] = False
            number[fill : fill + n] = document
            start, fill, document = start + n, fill + n, document + 1
            if fill == seq_len:
                yield ids, number, trained, seq_len
                ids, number, trained = _empty(seq_len)
                fill = document = 0


def pad_each(documents: Iterator[Document], seq_len: int, pad: int) -> Iterator[Row]:
    """One row per document, cut to `seq_len` tokens or padded on the right with `pad`."""
    for source in documents:
        ids, number, trained = _empty(seq_len)
        n = min(seq_len, len(source.ids))
        ids[:n], ids[n:] = source.ids[:n], pad
        trained[1:n] = source.trained[1:n]
        yield ids, number, trained, n


def with_recall(
    rows: Iterator[Row], share: float, seq_len: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Row]:
    """Mix in recall documents, one a row, as `share` of all rows; their filler is the text just before."""
    rng = random.Random(f"recall:{seed}")
    due = 0.0
    recent: list[int] = []
    for row in rows:
        yield row
        recent = [*recent, *row[0][: row[3]].tolist()][-4 * seq_len :]
        due += share / (1 - share)
        while due >= 1 and len(recent) >= seq_len:
            due -= 1
            ids, number, trained = _empty(seq_len)
            facts = rng.randint(1, min(_MOST_FACTS, max(1, seq_len // _TOKENS_PER_FACT)))
            ids[:] = recall_document(tokenizer, recent, seq_len, facts, rng)
            trained[1:] = True
            yield ids, number, trained, seq_len


def _empty(seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(seq_len, np.int32), np.zeros(seq_len, np.int32), np.zeros(seq_len, bool)
