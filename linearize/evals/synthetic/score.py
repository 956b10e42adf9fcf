"""Scores questions in two ways: by what the model writes, and by which of several answers it finds likeliest.

`score(subject, items)` asks those that `linearize.evals.synthetic.items` makes. Both ways decode through the cache,
so that a recurrent state is tested as it is used. Only prompts of equal length share a batch, so none is padded.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch

from linearize.arguments import cache_of, continued
from linearize.evals.finite import watching
from linearize.evals.probes.base import Subject
from linearize.evals.recall_score import generate_greedily, padding_id
from linearize.evals.statistics import wilson
from linearize.evals.synthetic.items import Item
from linearize.evals.text import evaluating
from linearize.progress import advance


class Prompted(Protocol):
    """What has a prompt and continuations to score."""

    @property
    def input_ids(self) -> list[int]:
        """The prompt."""

    @property
    def candidates(self) -> list[list[int]]:
        """Its continuations."""


P = TypeVar("P", bound=Prompted)


@dataclass(frozen=True)
class Score:
    """Result of one cell: questions of one length and depth."""

    n: int
    """Questions."""
    generated: float
    """Mean score of the greedy continuations, 0 to 1."""
    low: float
    """Lower end of its 95% Wilson interval; wider than need be for shares, which vary less than hits and misses."""
    high: float
    """Its upper end."""
    likelihood: float
    """Share of the questions whose right answer has a larger summed log-likelihood than each other candidate."""
    chance: float
    """What guessing among the candidates would give."""
    nats: float
    """Mean negative log-likelihood per token of the right answers."""


def score(subject: Subject, items: Sequence[Item]) -> Score:
    """Ask all `items`; batches of `subject.batch_size` change speed and memory, not the result.

    Where a prediction is not finite, all but `n` and `chance` are NaN.
    """
    generated, right, nats, tokens = [], 0, 0.0, 0
    chance = fmean(1 / len(item.candidates) for item in items)
    with watching(subject.model) as broken:
        for batch in batches_of(items, subject.batch_size):
            texts = _continue(subject, batch)
            generated += [matched(text, item.references) for text, item in zip(texts, batch, strict=True)]
            for item, found in zip(batch, log_likelihoods(subject.model, batch), strict=True):
                right += all(found[0] > other for other in found[1:])
                nats -= found[0]
                tokens += len(item.candidates[0])
        if broken():
            lost = dict.fromkeys(("generated", "low", "high", "likelihood", "nats"), math.nan)
            return Score(n=len(items), chance=chance, **lost)
    mean = fmean(generated)
    low, high = wilson(mean * len(items), len(items))
    return Score(len(items), mean, low, high, right / len(items), chance, nats / tokens)


def matched(text: str, references: Sequence[str]) -> float:
    """How much of the `references` a continuation gives, 0 to 1, regardless of case.

    A single reference has to begin it (exact match). Of several the share that it names anywhere counts, as RULER
    scores (arXiv:2404.06654, section 3), but as whole words: 123 is not in 1234.
    """
    if len(references) == 1:
        return float(_whole(references[0]).match(text.lstrip()) is not None)
    return sum(_whole(reference).search(text) is not None for reference in references) / len(references)


def _whole(reference: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(reference)}(?!\w)", re.IGNORECASE)


@torch.no_grad()
def log_likelihoods(model: Any, items: Sequence[Prompted]) -> list[list[float]]:
    """log p(candidate | prompt) in nats, summed over the candidate's tokens, for each candidate of each item.

    The prompts, all of one length, are read once; every candidate goes on from a copy of the cache. Shorter candidates
    of a batch have tokens behind them that nothing looks at.
    """
    device = next(model.parameters()).device
    prompts = torch.tensor([item.input_ids for item in items], device=device)
    with evaluating(model):
        read = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        first = read.logits[:, -1:].float().log_softmax(-1)  # [B, 1, V]
        columns = []
        for candidates in zip(*(item.candidates for item in items), strict=True):
            width = max(map(len, candidates))
            ids = torch.tensor([[*c, *[c[-1]] * (width - len(c))] for c in candidates], device=device)
            log_p = first
            if width > 1:
                cache = copy.deepcopy(cache_of(read))
                more = continued(model, cache, input_ids=ids[:, :-1]).logits
                log_p = torch.cat([first, more.float().log_softmax(-1)], dim=1)
            taken = log_p.gather(-1, ids[..., None])[..., 0].double().tolist()  # [B, width]
            columns.append([sum(row[: len(c)]) for row, c in zip(taken, candidates, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def _continue(subject: Subject, items: Sequence[Item]) -> list[str]:
    """What the model writes after each prompt, in as many tokens as the right answer has."""
    lengths = [len(item.candidates[0]) for item in items]
    prompts = [item.input_ids for item in items]
    pad = padding_id(subject.tokenizer)
    found = generate_greedily(subject.model, prompts, tokens=max(lengths), pad=pad)
    cut = [ids[:length] for ids, length in zip(found, lengths, strict=True)]
    return [subject.tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]


def batches_of(items: Sequence[P], size: int) -> Iterator[list[P]]:
    """Prompts of equal length, at most `size` together."""
    for _, group in groupby(sorted(items, key=_length), key=_length):
        same = list(group)
        for i in range(0, len(same), size):
            yield (batch := same[i : i + size])
            advance(sum(len(item.input_ids) + max(map(len, item.candidates)) for item in batch))


def _length(item: Prompted) -> int:
    return len(item.input_ids)
