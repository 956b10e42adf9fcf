"""Scores synthetic recall: does the model still know a number that it read some hundred tokens ago?

`recall(model, tokenizer, filler)` asks the questions that `linearize.evals.recall` writes, decodes greedily
through the cache, and compares the digits. Loss on text hardly notices when this ability is lost, so it is
reported beside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from linearize.evals.finite import BROKEN, watching
from linearize.evals.recall import LEAD, RecallItem, make_prompt
from linearize.evals.statistics import wilson
from linearize.evals.text import evaluating
from linearize.progress import advance

CASES: tuple[tuple[int, int], ...] = ((1, 200), (1, 900), (1, 1800), (4, 1700), (8, 1500))
"""(facts, tokens between the facts and the question) that are asked when nothing else is said."""


@dataclass(frozen=True)
class RecallScore:
    """Result of one case."""

    facts: int
    distance: int
    """Tokens between fact and question."""
    exact_match: float | None
    """Share of answers whose digits are all right; None when the case has no result."""
    n: int
    """Questions asked."""
    low: float | None = None
    """Lower end of the 95% Wilson interval of `exact_match`."""
    high: float | None = None
    """Its upper end."""
    skipped: str | None = None
    """Why the case was not asked, or has no result."""


def recall(
    model: Any,
    tokenizer: Any,
    filler_tokens: torch.Tensor | Sequence[int],
    cases: Sequence[tuple[int, int]] = CASES,
    *,
    items_per_case: int = 32,
    seed: int = 0,
    batch_size: int = 8,
) -> list[RecallScore]:
    """Ask `items_per_case` questions for each (facts, distance) of `cases`.

    A case whose prompts do not fit into the model's `max_position_embeddings`, or whose filler is longer than the text,
    is skipped, and its row says so; one with predictions that are not finite has no result. The questions depend on
    `seed` and the case alone.

    Args:
        filler_tokens: [N] ordinary text in which the facts are hidden.
    """
    filler = torch.as_tensor(filler_tokens).tolist()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    scores = []
    for facts, distance in cases:
        if reason := _too_far(distance, limit, len(filler)):
            scores.append(RecallScore(facts, distance, None, 0, skipped=reason))
            continue
        rng = random.Random(f"{seed}:{facts}:{distance}")
        items = [make_prompt(tokenizer, filler, facts, distance, rng) for _ in range(items_per_case)]
        needed = max(len(item.input_ids) + len(item.answer_ids) for item in items)
        if limit is not None and needed > limit:
            reason = f"needs {needed} tokens of context, the model has {limit}"
            scores.append(RecallScore(facts, distance, None, 0, skipped=reason))
            continue
        batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        with watching(model) as broken:
            right = 0
            for batch in batches:
                right += _count_right(model, tokenizer, batch)
                advance(sum(len(item.input_ids) + len(item.answer_ids) for item in batch))
            if broken():
                scores.append(RecallScore(facts, distance, None, len(items), skipped=BROKEN))
                continue
        low, high = wilson(right, len(items))
        scores.append(RecallScore(facts, distance, right / len(items), len(items), low, high))
    return scores


def _too_far(distance: int, positions: int | None, filler: int) -> str | None:
    """Why no question fits, None where one may."""
    needed = LEAD + distance
    if positions is not None and needed > positions:
        return f"needs more than {needed} tokens of context, the model has {positions}"
    return f"needs {needed} tokens of text around the facts, the text has {filler}" if needed > filler else None


def generate_greedily(model: Any, prompts: Sequence[Sequence[int]], *, tokens: int, pad: int) -> list[list[int]]:
    """Greedy continuations of `tokens` tokens each; prompts of different lengths are padded on the left.

    Penalties and the like of the checkpoint's generation_config.json do not count: the model is measured, not they.
    """
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with evaluating(model), _own_settings_only(model):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
        )
    return output[:, width:].tolist()


@contextmanager
def _own_settings_only(model: Any) -> Iterator[None]:
    """Of the model's generation_config, which `generate` falls back to for all that is not given, the end alone."""
    found = getattr(model, "generation_config", None)
    if found is not None:
        model.generation_config = GenerationConfig(eos_token_id=found.eos_token_id)
    try:
        yield
    finally:
        if found is not None:
            model.generation_config = found


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's padding token, else its end-of-text token, else 0; the attention mask hides it."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def _count_right(model: Any, tokenizer: Any, items: Sequence[RecallItem]) -> int:
    longest = max(len(item.answer_ids) for item in items)
    answers = generate_greedily(model, [item.input_ids for item in items], tokens=longest, pad=padding_id(tokenizer))
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return sum(_digits(text) == item.number for text, item in zip(texts, items, strict=True))


def _digits(answer: str) -> str | None:
    """The number an answer begins with; all digits count, so that a longer number is not a match."""
    found = re.match(r"\s*(\d+)", answer)
    return found.group(1) if found else None
