"""Synthetic recall: facts hidden in ordinary text, then a question, in the format the demo teacher knows.

`make_prompt` builds one test item with a given distance between facts and question; `recall_document` builds
training data. Both are functions of the tokenizer, the filler text and the random generator alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.errors import UserError

WORDS = (  # noqa: SIM905
    "river lantern copper violet hammer saddle orchard falcon winter marble thunder garden pepper silver "
    "anchor basket candle dragon engine forest goblet harbor island jacket kettle ladder mirror needle "
    "oyster pillow quarry ribbon shadow temple valley walnut yellow zephyr amber bridge castle desert "
    "ember feather granite hollow ivory jungle"
).split()
LEAD = 24
"""Filler tokens before the first fact of a prompt: models read a fact badly that opens the text."""
FACT = "\nThe special number for {word} is {number}.\n"
QUESTION = "\nWhat is the special number for {word}? The special number for {word} is"
ANSWER = " {number}."


@dataclass(frozen=True)
class RecallItem:
    """One question: after `input_ids` a model that remembers continues with `answer_ids`.

    `distance` counts the tokens between the end of the asked fact and the start of the question.
    """

    input_ids: list[int]
    answer_ids: list[int]
    word: str
    number: str
    distance: int


def facts(n: int, rng: random.Random) -> list[tuple[str, str]]:
    """`n` pairs of a word and a number of five digits; words and numbers are all different."""
    if not 1 <= n <= len(WORDS):
        raise UserError(f"recall with {n} facts is impossible; choose 1 to {len(WORDS)}, one for each known word")
    return list(zip(rng.sample(WORDS, n), map(str, rng.sample(range(10_000, 100_000), n)), strict=True))


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    filler_token_ids: Sequence[int],
    n_facts: int,
    distance: int,
    rng: random.Random,
) -> RecallItem:
    """A prompt of `n_facts` facts in `distance` tokens of filler, asking for a random one of the facts.

    The first fact stands behind `LEAD` tokens and the others are spread over the filler at random, so with one fact
    `distance` is the exact gap between fact and question; with several, the item's own `distance` is the gap of the
    one asked. The filler is a random contiguous stretch of `filler_token_ids`.

    Raises:
        UserError: when there are fewer filler tokens than `LEAD + distance`, or more facts than words.
    """
    chosen = facts(n_facts, rng)
    asked = rng.randrange(n_facts)
    word, number = chosen[asked]
    pieces = [encode(tokenizer, FACT.format(word=w, number=m)) for w, m in chosen]
    body, ends = _spread(pieces, stretch(filler_token_ids, distance + LEAD, rng), first=LEAD, rng=rng)
    question, answer = _question(tokenizer, word, number)
    return RecallItem(
        input_ids=[*leading_bos(tokenizer), *body, *question],
        answer_ids=answer,
        word=word,
        number=number,
        distance=len(body) - ends[asked],
    )


def recall_document(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], length: int, n_facts: int, rng: random.Random
) -> tuple[list[int], list[bool]]:
    """Training document of exactly `length` tokens: facts in filler, then questions with answers on all.

    Returns:
        Its token ids, and for each whether it is of an answer.

    Raises:
        UserError: when `length` has no room for the facts and questions, or `filler` is too short.
    """
    chosen = facts(n_facts, rng)
    pieces = [encode(tokenizer, FACT.format(word=w, number=m)) for w, m in chosen]
    questions: list[int] = []
    answers: list[bool] = []
    for word, number in rng.sample(chosen, n_facts):
        question, answer = _question(tokenizer, word, number)
        questions += question + answer
        answers += [False] * len(question) + [True] * len(answer)
    bos = leading_bos(tokenizer)
    room = length - len(bos) - sum(map(len, pieces)) - len(questions)
    if room < 0:
        raise UserError(
            f"a recall document of {length} tokens cannot hold {n_facts} facts, which take {length - room}"
            "; use fewer facts or a larger data.seq_len"
        )
    body, _ = _spread(pieces, stretch(filler, room, rng), first=rng.randint(0, room), rng=rng)
    return [*bos, *body, *questions], [False] * (length - len(answers)) + answers


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of `text` alone, without those that begin or end a document."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if this tokenizer puts one before a text."""
    added = tokenizer("")["input_ids"][:1]
    return added if added == [tokenizer.bos_token_id] else []


def alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def continuations(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Tokens of `prompt` and of each answer, split where the tokenizer would go on after the prompt.

    The split is the same for all answers: where the tokens of the prompt with one of them first differ from those of
    the prompt alone.
    """
    alone = encode(tokenizer, prompt)
    whole = [encode(tokenizer, prompt + answer) for answer in answers]
    same = min(alike(alone, both) for both in whole)
    return alone[:same], [both[same:] for both in whole]


def _question(tokenizer: PreTrainedTokenizerBase, word: str, number: str) -> tuple[list[int], list[int]]:
    question, (answer,) = continuations(tokenizer, QUESTION.format(word=word), [ANSWER.format(number=number)])
    return question, answer


def stretch(filler: Sequence[int], length: int, rng: random.Random) -> list[int]:
    """A random contiguous stretch of `length` tokens.

    Raises:
        UserError: when `filler` is shorter.
    """
    if len(filler) < length:
        raise UserError(
            f"recall needs {length} tokens of filler text and has {len(filler)}; give longer text or a shorter distance"
        )
    start = rng.randint(0, len(filler) - length)
    return list(filler[start : start + length])


def _spread(pieces: list[list[int]], filler: list[int], first: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """The first piece before `filler[first]`, the others at random places behind it; also where each ends."""
    places = [first, *sorted(rng.randint(first, len(filler)) for _ in pieces[1:])]
    body: list[int] = []
    ends: list[int] = []
    for piece, place, until in zip(pieces, places, [*places[1:], len(filler)], strict=True):
        if not ends:
            body += filler[:place]
        body += piece
        ends.append(len(body))
        body += filler[place:until]
    return body, ends
