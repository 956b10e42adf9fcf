"""Recall prompts and documents: the exact text, distances in tokens, and what is refused."""

import random

import pytest
from transformers import AutoTokenizer

from linearize import demo
from linearize.errors import UserError
from linearize.evals.recall import LEAD, WORDS, facts, make_prompt, recall_document


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture(scope="module")
def filler(tokenizer):
    return tokenizer("It was the best of times, it was the worst of times. " * 100)["input_ids"]


def test_one_fact_reads_exactly_as_the_teacher_learned_it(tokenizer, filler):
    item = make_prompt(tokenizer, filler, 1, 40, random.Random(1))
    text = tokenizer.decode(item.input_ids)
    fact = f"\nThe special number for {item.word} is {item.number}.\n"
    question = f"\nWhat is the special number for {item.word}? The special number for {item.word} is"
    assert fact in text and text.endswith(question)
    assert len(tokenizer(text.split(fact)[0])["input_ids"]) == LEAD
    assert tokenizer.decode(item.answer_ids) == f" {item.number}."
    between = len(item.input_ids) - LEAD - len(tokenizer(fact)["input_ids"]) - len(tokenizer(question)["input_ids"])
    assert item.distance == between == 40


def test_several_facts_are_spread_and_any_of_them_is_asked(tokenizer, filler):
    rng = random.Random(0)
    asked = set()
    for _ in range(20):
        item = make_prompt(tokenizer, filler, 4, 300, rng)
        text = tokenizer.decode(item.input_ids)
        assert text.count("The special number for") == 5  # four facts, and the start of the answer
        before, fact, _ = text.partition(f"\nThe special number for {item.word} is {item.number}.\n")
        assert fact
        question = len(tokenizer(f"\nWhat is the special number for {item.word}? The special number for x is"))
        assert item.distance <= 300 + 4 * 20 and item.distance < len(item.input_ids) - question
        asked.add(before.count("The special number for"))
    assert asked == {0, 1, 2, 3}


def test_same_generator_same_item(tokenizer, filler):
    first, again, other = (make_prompt(tokenizer, filler, 2, 50, random.Random(s)) for s in (3, 3, 4))
    assert first == again != other


def test_beginning_of_sequence_only_where_the_tokenizer_puts_it(tokenizer, filler):
    from tokenizers.processors import TemplateProcessing

    with_bos = AutoTokenizer.from_pretrained(demo.model_path())
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = make_prompt(tokenizer, filler, 2, 50, random.Random(0)).input_ids
    assert make_prompt(with_bos, filler, 2, 50, random.Random(0)).input_ids == [0, *plain]
    assert recall_document(with_bos, filler, 200, 2, random.Random(0))[0].count(0) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_document_has_its_length_and_asks_every_fact(tokenizer, filler, n):
    ids, answers = recall_document(tokenizer, filler, 256, n, random.Random(5))
    text = tokenizer.decode(ids)
    assert len(ids) == 256
    known = dict(
        line.removeprefix("The special number for ").rstrip(".").split(" is ")
        for line in text.splitlines()
        if line.startswith("The special number for ")
    )
    assert len(known) == n
    for word, number in known.items():
        assert f"\nWhat is the special number for {word}? The special number for {word} is {number}." in text
    told = tokenizer.decode([token for token, answer in zip(ids, answers, strict=True) if answer])
    assert sorted(told.removesuffix(".").split(".")) == sorted(f" {number}" for number in known.values())


def test_facts_are_distinct_and_five_digits():
    pairs = facts(len(WORDS), random.Random(0))
    assert len(WORDS) == 48 == len(set(WORDS))
    assert len({word for word, _ in pairs}) == len({number for _, number in pairs}) == len(WORDS)
    assert all(len(number) == 5 and number.isdigit() for _, number in pairs)


def test_refusals_say_what_is_possible(tokenizer, filler):
    with pytest.raises(UserError, match="49 facts is impossible; choose 1 to 48"):
        facts(49, random.Random(0))
    with pytest.raises(UserError, match="recall needs 84 tokens of filler text and has 50"):
        make_prompt(tokenizer, filler[:50], 1, 60, random.Random(0))
    with pytest.raises(UserError, match="32 tokens cannot hold 4 facts, which take"):
        recall_document(tokenizer, filler, 32, 4, random.Random(0))
