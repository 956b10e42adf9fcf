"""Synthetic tasks: solvable from the prompt alone, of exact length and depth, and scores of known answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from linearize import demo
from linearize.errors import UserError
from linearize.evals.config import EvalConfig
from linearize.evals.probe_groups import GROUPS
from linearize.evals.probes.base import Probe, Subject, probe_of
from linearize.evals.probes.frequent_words import frequencies
from linearize.evals.probes.grammar import longest_cycle, rules
from linearize.evals.recall import encode
from linearize.evals.synthetic.items import Fitter, Puzzle, largest
from linearize.evals.synthetic.probe import KEYS, DepthProbe, SyntheticProbe
from linearize.evals.synthetic.score import log_likelihoods, matched
from linearize.registry import find, keys

sys.path.insert(0, str(Path(__file__).parent))
import solvers

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
TASKS = [key for key in keys("evals.probes") if issubclass(find("evals.probes", key, Probe), SyntheticProbe)]
LENGTHS = {"pico": 900, "demo": 400}
"""Tokens in which every task finds room, of characters and of words."""


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture(params=["pico", "demo"])
def tokenizer(request: pytest.FixtureRequest, pico_tokenizer: Any, demo_tokenizer: Any) -> Any:
    return {"pico": pico_tokenizer, "demo": demo_tokenizer}[request.param]


@pytest.fixture
def length(tokenizer: Any, pico_tokenizer: Any) -> int:
    return LENGTHS["pico" if tokenizer is pico_tokenizer else "demo"]


class Output(dict):
    """What models return: a mapping with attributes."""

    __getattr__ = dict.__getitem__


class Answering(torch.nn.Module):
    """A model that is sure of `answer(prompt)` and nothing else."""

    def __init__(self, answer: Callable[[list[int]], list[int]], vocabulary: int, positions: int | None = None):
        super().__init__()
        self.answer, self.vocabulary = answer, vocabulary
        self.weight = torch.nn.Parameter(torch.zeros(1))
        text = SimpleNamespace(max_position_embeddings=positions)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def generate(
        self, input_ids: Any, attention_mask: Any, max_new_tokens: int, pad_token_id: int, **kwargs: Any
    ) -> Any:
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        rows = [[*self.answer(prompt), *[pad_token_id] * max_new_tokens][:max_new_tokens] for prompt in prompts]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any:
        told = cache or [self.answer(row.tolist()) for row in input_ids]
        width = 1 if cache is None else input_ids.shape[1]
        logits = torch.zeros(len(told), width, self.vocabulary)
        for row, ids in enumerate(told):
            for at in range(width):
                logits[row, at, [*ids, *[0] * width][at + (cache is not None)]] = 10.0
        return Output(logits=logits, cache=told)


def read(tokenizer: Any, ids: list[int]) -> str:
    """The text of a prompt; the pico tokenizer has no newline and writes its unknown token instead."""
    return tokenizer.decode(ids).replace("</s>", "\n")


def ask(probe: Probe, tokenizer: Any, answer: Callable[[list[int]], list[int]], **limits: Any) -> dict[str, Any]:
    text = torch.tensor(encode(tokenizer, PROSE * 200))
    model = Answering(answer, len(tokenizer), **limits)
    return probe.run(Subject(model=model, tokenizer=tokenizer, text=text, seq_len=32, batch_size=3))


def all_items(probe: Any, tokenizer: Any, length: int) -> list[Any]:
    fitter = Fitter(tokenizer, encode(tokenizer, PROSE * 200), probe.config.just_read_twice)
    return [item for case in probe.cases() for item in probe.items(fitter, length, case)]


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_follows_from_the_prompt(task: str, twice: bool, tokenizer: Any, length: int) -> None:
    def solve(prompt: list[int]) -> list[int]:
        words = list(dict.fromkeys(getattr(solvers, task)(read(tokenizer, prompt))))
        return encode(tokenizer, f" {', '.join(words[:-1])}{' and ' if words[1:] else ''}{words[-1]}.")

    long = (1 + twice) * length
    probe = probe_of({"type": task, "lengths": [long], "items": 6, "just_read_twice": twice})
    found = ask(probe, tokenizer, solve)
    assert found["notes"] == [] and len(found["cells"]) == len(probe.cases())
    assert [cell["generated"] for cell in found["cells"]] == [1.0] * len(found["cells"])


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_one_and_those_of_other_questions_do_not(task: str, tokenizer: Any, length: int) -> None:
    probe = probe_of({"type": task, "lengths": [length], "items": 12})
    items = all_items(probe, tokenizer, length)
    right = {tuple(item.input_ids): item.candidates[0] for item in items}
    assert len(right) == len(items)
    others = dict(zip(right, [*list(right.values())[5:], *list(right.values())[:5]], strict=True))
    for cell in ask(probe, tokenizer, lambda prompt: right[tuple(prompt)])["cells"]:
        assert cell["generated"] == cell["likelihood"] == 1.0 and cell["high"] == pytest.approx(1.0)
        assert cell["nats"] == pytest.approx(math.log1p((len(tokenizer) - 1) * math.exp(-10)), rel=1e-3)
        assert 0.25 <= cell["chance"] <= 0.5 and cell["n"] == 12
    cells = ask(probe, tokenizer, lambda prompt: others[tuple(prompt)])["cells"]
    assert sum(cell["generated"] for cell in cells) / len(cells) < 0.35
    assert sum(cell["likelihood"] - cell["chance"] for cell in cells) / len(cells) < 0.3


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_exact_length(task: str, twice: bool, tokenizer: Any, length: int) -> None:
    for long in (2 * length, 2 * length + 1):
        probe = probe_of({"type": task, "items": 2, "just_read_twice": twice})
        for item in all_items(probe, tokenizer, long):
            assert len(item.input_ids) + max(map(len, item.candidates)) == long
            text = read(tokenizer, item.input_ids)
            for candidate in item.candidates:  # as the tokenizer writes question and answer in one
                tail = text.rpartition("\n")[2] + tokenizer.decode(candidate)
                assert [*item.input_ids, *candidate][-len(encode(tokenizer, tail)) :] == encode(tokenizer, tail)


@pytest.mark.parametrize("task", [key for key in TASKS if issubclass(find("evals.probes", key, Probe), DepthProbe)])
def test_what_is_asked_stands_at_its_depth(task: str, tokenizer: Any, length: int) -> None:
    depths = [0.0, 0.1, 0.5, 0.9, 1.0]
    probe = probe_of({"type": task, "depths": depths, "items": 3})
    fitter = Fitter(tokenizer, encode(tokenizer, PROSE * 200))
    for depth in depths:
        for i, item in enumerate(probe.items(fitter, length, depth)):
            puzzle = probe._puzzle(length, depth, i, 0)
            pieces = [fitter.tokens(piece) for piece in puzzle.context]
            asked = [token for piece in pieces for token in piece] if puzzle.together else pieces[puzzle.asked]
            (at,) = places(item.input_ids, asked)
            before = [] if puzzle.together else [p for p in pieces if p != asked and places(item.input_ids, p)[0] < at]
            n = length - fitter.needed(puzzle)
            assert at - sum(map(len, before)) == round(depth * n)


def places(ids: list[int], piece: list[int]) -> list[int]:
    return [i for i in range(len(ids)) if ids[i : i + len(piece)] == piece]


@pytest.mark.parametrize("task", TASKS)
def test_questions_depend_on_the_seed_and_their_cell_alone(task: str, demo_tokenizer: Any) -> None:
    def asked(**settings: Any) -> list[Any]:
        return all_items(probe_of({"type": task, "items": 3, **settings}), demo_tokenizer, LENGTHS["demo"])

    first = asked()
    assert asked() == first
    assert [item for item in asked(seed=1) if item in first] == []
    cases = len(probe_of(task).cases())
    more = asked(items=5)
    assert [item for i in range(cases) for item in more[5 * i : 5 * i + 3]] == first


def test_lengths_that_do_not_fit_have_a_note(demo_tokenizer: Any) -> None:
    probe = probe_of({"type": "niah_single", "lengths": [16, 100, 300, "1M"], "items": 2, "depths": [0.5]})
    found = ask(probe, demo_tokenizer, lambda prompt: [5], positions=200)
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == [(100, 0.5)]
    short, beyond, far = found["notes"]
    assert (
        short.startswith("length 16 was not asked: a question takes up to 4")
        and "the model has 200 positions" in beyond
    )
    assert "1000000" in far
    assert "held-out text that fills it has" in ask(probe, demo_tokenizer, lambda prompt: [5])["notes"][-1]


def test_default_lengths_follow_the_training_length(demo_tokenizer: Any) -> None:
    text = torch.tensor(encode(demo_tokenizer, PROSE * 50))
    model = Answering(lambda prompt: [5], len(demo_tokenizer))
    probe = probe_of({"type": "passkey", "items": 1, "depths": [0.5]})
    found = probe.run(Subject(model=model, tokenizer=demo_tokenizer, text=text, seq_len=128))
    assert [cell["length"] for cell in found["cells"]] == [64, 128, 256]


def test_a_context_read_twice_is_the_same_twice(demo_tokenizer: Any) -> None:
    probe = probe_of({"type": "niah_multikey", "items": 2, "just_read_twice": True})
    for length in (600, 601):
        for item in all_items(probe, demo_tokenizer, length):
            context = read(demo_tokenizer, item.input_ids).rpartition("\nWhat")[0]
            end = len(item.input_ids) - len(places_of_question(demo_tokenizer, item.input_ids))
            half = end // 2
            assert item.input_ids[end - 2 * half : end - half] == item.input_ids[end - half : end]
            assert context.count("The special number for") == 8


def places_of_question(tokenizer: Any, ids: list[int]) -> list[int]:
    return encode(tokenizer, "\n" + read(tokenizer, ids).rpartition("\n")[2])


@pytest.mark.parametrize(("mixer", "layers"), [(None, ""), ("gdn", "LSL"), ("lolcats", "LLL"), ("log_linear", "LLL")])
def test_log_likelihoods_are_those_of_one_pass_without_a_cache(
    mixer: str | None, layers: str, pico_model: Any, converted: Any, pico_tokenizer: Any
) -> None:
    model = converted(mixer, layers) if mixer else pico_model()
    items = all_items(probe_of({"type": "niah_single", "items": 2}), pico_tokenizer, 200)[:4]
    for item, found in zip(items, log_likelihoods(model, items), strict=True):
        for candidate, value in zip(item.candidates, found, strict=True):
            ids = torch.tensor([[*item.input_ids, *candidate]])
            with torch.no_grad():
                log_p = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            start = len(item.input_ids) - 1
            expected = sum(float(log_p[start + i, token]) for i, token in enumerate(candidate))
            assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("task", ["mqar", "niah_multiquery"])
def test_batches_do_not_change_scores(task: str, converted: Any, pico_tokenizer: Any) -> None:
    model = converted("gdn", "LSL", max_position_embeddings=1024)
    text = torch.tensor(encode(pico_tokenizer, PROSE * 20))
    settings = {"type": task, "lengths": [600], "items": 5}
    probe = probe_of(settings | ({"depths": [0.3]} if task == "mqar" else {}))
    one, four = (
        probe.run(Subject(model=model, tokenizer=pico_tokenizer, text=text, seq_len=32, batch_size=size))["cells"]
        for size in (1, 4)
    )
    assert len(one) == len(four) == len(probe.cases())
    for a, b in zip(one, four, strict=True):
        assert [a[key] for key in KEYS] == pytest.approx([b[key] for key in KEYS], rel=1e-5)


def test_matching() -> None:
    assert matched(" 123. And", ["123"]) == 1 and matched(" Kitchen", ["kitchen"]) == 1
    assert matched(" 1234.", ["123"]) == matched(" the 123.", ["123"]) == matched("", ["123"]) == 0
    assert matched(" 7, 1234 and 5.", ["5", "123", "7", "8"]) == 0.5
    assert matched(" a, b and c.", ["a, b and c"]) == 1 and matched(" b, a and c.", ["a, b and c"]) == 0


def test_the_views_show_every_cell(demo_tokenizer: Any) -> None:
    probe = probe_of({"type": "passkey", "lengths": [100, 200], "items": 2, "depths": [0.0, 1.0]})
    found = ask(probe, demo_tokenizer, lambda prompt: [5])
    found["cells"][1]["generated"] = 0.5
    heat, other, table = type(probe).views({"student": found, "teacher": {**found, "cells": found["cells"][2:]}})
    assert (heat.x, heat.y, heat.values) == (["100", "200"], ["0.0", "1.0"], [[0.0, 0.0], [50.0, 0.0]])
    assert other.x == ["200"] and len(table.rows) == 6 and table.rows[1][:5] == ["student", 100, "1.0", 2, "50%"]


def test_frequencies_are_a_zeta_distribution() -> None:
    counts = frequencies(20, 3, 2.0)
    assert counts[:6] == [180, 45, 20, 11, 7, 5] and counts[-1] == 1
    for size, alpha in ((2, 2.0), (2, 1.01), (2, 4.0), (50, 1.5)):
        first, second, third, *rest = frequencies(size, 3, alpha)
        assert first > second > third == size > max(rest) and len(rest) >= 3


def test_every_walk_through_a_grammar_comes_round() -> None:
    import random

    found = rules(["a", "b", "c", "d"], 2, random.Random(0))
    assert len(found) == 16 and len({(*state[1:], symbol) for state, symbol in found.items()}) == 16
    cycle = longest_cycle(found)
    for i in range(len(cycle)):
        a, b, c = (cycle[(i + k) % len(cycle)] for k in range(3))
        assert found[a, b] == c
    seeds = (longest_cycle(rules(list("abcd"), 2, random.Random(seed))) for seed in range(20))
    assert min(map(len, seeds)) >= 4


@pytest.mark.parametrize(("symbols", "order"), [(3, 2), (4, 2), (4, 3)])
def test_a_grammar_is_not_solved_by_counting(symbols: int, order: int) -> None:
    """A reader who knows no rule, but which symbols there are and how frequent they are, is not much above chance."""
    import random
    from collections import Counter

    probe = probe_of({"type": "grammar", "symbols": symbols, "order": order, "gap": 0})
    ranks: Counter[int] = Counter()
    for seed in range(600):
        puzzle = probe.write(random.Random(seed), "all", 5 + seed % 7)
        counts = Counter(piece.strip() for piece in puzzle.context[1:-1])
        assert len(counts) == symbols, "a symbol that never comes would be known for wrong"
        (answer,) = puzzle.references
        ranks[sorted(counts, key=lambda word: (-counts[word], word)).index(answer)] += 1
    assert ranks[0] / 600 < 1.2 / symbols, "the most frequent one"
    assert max(ranks.values()) / 600 < 1.2 / symbols + 0.1


def test_the_largest_that_fits() -> None:
    assert [largest(lambda n, top=top: n <= top, 3) for top in (3, 5, 6, 7, 1000)] == [3, 5, 6, 7, 1000]


def test_pieces_keep_their_order(demo_tokenizer: Any) -> None:
    import random

    pieces = [f"\n{i}\n" for i in range(6)]
    puzzle = Puzzle(context=pieces, question="\nWhat?", answer=" x.", wrong=[" y."], references=["x"])
    item = Fitter(demo_tokenizer, encode(demo_tokenizer, PROSE * 9)).item(puzzle, 120, random.Random(0))
    text = read(demo_tokenizer, item.input_ids)
    assert sorted(pieces, key=text.index) == pieces


def test_groups_name_every_task_once() -> None:
    named = [probe for probes in GROUPS.values() for probe in probes]
    assert sorted(named) == sorted(set(named)) and set(TASKS) <= set(named) <= set(keys("evals.probes"))
    config = EvalConfig(probes=["mqar", "recall", {"type": "mqar", "pairs": 4}])
    assert [probe["type"] for probe in config.probes[:-1]] == ["mqar", *(p for p in GROUPS["recall"] if p != "mqar")]
    assert config.probes[-1]["pairs"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "mqar", "pairs": 2, "queries": 3}, "queries must be at most pairs"),
        ({"type": "common_words", "repeats": 2, "rare_repeats": 2}, "repeats must be more than rare_repeats"),
        ({"type": "common_words", "depths": [0.5]}, "unknown key 'probes.depths'"),
        ({"type": "passkey", "depths": [1.5]}, "probes.depths.0"),
        ({"type": "babilong", "tasks": [4]}, "probes.tasks.0"),
        ({"type": "grammar", "symbols": 2, "order": 1}, "got symbols=2 and order=1, set symbols to 3 or more"),
    ],
)
def test_wrong_settings_are_named(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe_of(settings)
