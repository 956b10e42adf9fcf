"""Lays tokenised documents into rows of one length: packed end to end, or one document each with padding.

A row marks where documents begin, because nothing may be predicted, or remembered, across a boundary.
`linearize.data` writes the rows to disk; `with_recall` mixes synthetic recall documents among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from linearize.data.encoding import Document
from linearize.evals.recall import recall_document


class Row(NamedTuple):
    """One row as it lies on disk."""

    ids: np.ndarray
    """`[T]` int32."""
    documents: np.ndarray
    """Number of the document that a token is of, `[T]` int32."""
    trained: np.ndarray
    """Whether a token is a target, `[T]` bool."""
    answers: np.ndarray
    """Whether a token is of an answer in a recall document, `[T]` bool."""
    length: int
    """How many of the tokens are real."""

    @classmethod
    def blank(cls, seq_len: int, fill: int = 0) -> Row:
        """A row of `fill` in which nothing is trained, all of it real."""
        ids, documents = np.full(seq_len, fill, np.int32), np.zeros(seq_len, np.int32)
        return cls(ids, documents, np.zeros(seq_len, bool), np.zeros(seq_len, bool), seq_len)


_MOST_FACTS = 8
_TOKENS_PER_FACT = 128


def pack(documents: Iterator[Document], seq_len: int) -> Iterator[Row]:
    """Lay documents end to end and cut every `seq_len` tokens; a rest shorter than that is dropped."""
    row = Row.blank(seq_len)
    fill = document = 0
    for source in documents:
        start = 0
        while start < len(source.ids):
            n = min(seq_len - fill, len(source.ids) - start)
            row.ids[fill : fill + n] = source.ids[start : start + n]
            row.trained[fill : fill + n] = source.trained[start : start + n]
            row.trained[fill] = False
            row.documents[fill : fill + n] = document
            start, fill, document = start + n, fill + n, document + 1
            if fill == seq_len:
                yield row
                row = Row.blank(seq_len)
                fill = document = 0


def pad_each(documents: Iterator[Document], seq_len: int, pad: int) -> Iterator[Row]:
    """One row per document, cut to `seq_len` tokens or padded on the right with `pad`."""
    for source in documents:
        row = Row.blank(seq_len, pad)
        n = min(seq_len, len(source.ids))
        row.ids[:n] = source.ids[:n]
        row.trained[1:n] = source.trained[1:n]
        yield row._replace(length=n)


def with_recall(
    rows: Iterator[Row], share: float, seq_len: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Row]:
    """Mix in recall documents, one a row, as `share` of all rows; their filler is the text just before."""
    rng = random.Random(f"recall:{seed}")
    due = 0.0
    recent: list[int] = []
    for row in rows:
        yield row
        recent = [*recent, *row.ids[: row.length].tolist()][-4 * seq_len :]
        due += share / (1 - share)
        while due >= 1 and len(recent) >= seq_len:
            due -= 1
            document = Row.blank(seq_len)
            facts = rng.randint(1, min(_MOST_FACTS, max(1, seq_len // _TOKENS_PER_FACT)))
            document.ids[:], document.answers[:] = recall_document(tokenizer, recent, seq_len, facts, rng)
            document.trained[1:] = True
            yield document
