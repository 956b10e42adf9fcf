"""Recall scoring, on models whose answers are known: an oracle, one with wrong numbers, and a pico model."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from linearize.evals.recall_score import generate_greedily, recall
from linearize.swap import teacher_path

CASES = [(1, 40), (3, 60)]
FILLER = list(range(2, 97)) * 40


class Oracle(torch.nn.Module):
    """Answers from the prompt's text: the number it was told, changed by `spoil`."""

    def __init__(self, tokenizer, spoil=lambda number: number, positions=4096):
        super().__init__()
        self.tokenizer, self.spoil = tokenizer, spoil
        self.weight = torch.nn.Parameter(torch.zeros(1))
        text = SimpleNamespace(max_position_embeddings=positions)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.prompts: list[str] = []

    def generate(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            self.prompts.append(prompt)
            word = re.search(r"special number for (\w+) is$", prompt).group(1)
            number = re.search(rf"special number for {word} is (\d+)\.", prompt).group(1)
            answer = self.tokenizer(f" {self.spoil(number)}.", add_special_tokens=False)["input_ids"]
            rows.append([*answer, *[1] * max_new_tokens][:max_new_tokens])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_an_oracle_scores_one(pico_tokenizer):
    scores = recall(Oracle(pico_tokenizer), pico_tokenizer, FILLER, CASES, items_per_case=10, batch_size=3)
    assert [(s.facts, s.distance, s.exact_match, s.n) for s in scores] == [(1, 40, 1.0, 10), (3, 60, 1.0, 10)]
    assert scores[0].low == pytest.approx(0.7225, abs=1e-4) and scores[0].high == pytest.approx(1.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n: n[1:] + n[0] if n[0] != n[-1] else "x",
        lambda n: n[:4],
        lambda n: n + "7",
        lambda n: "the " + n,
    ],
    ids=["rotated", "too short", "too long", "late"],
)
def test_wrong_answers_score_zero(pico_tokenizer, spoil):
    scores = recall(Oracle(pico_tokenizer, spoil), pico_tokenizer, FILLER, CASES, items_per_case=5)
    assert [s.exact_match for s in scores] == [0.0, 0.0]


def test_questions_depend_on_seed_and_case_only(pico_tokenizer):
    def prompts(cases, **settings):
        oracle = Oracle(pico_tokenizer)
        recall(oracle, pico_tokenizer, FILLER, cases, items_per_case=4, **settings)
        return oracle.prompts

    assert prompts(CASES)[4:] == prompts(CASES[1:], batch_size=1)
    assert prompts(CASES) != prompts(CASES, seed=1)


def test_a_case_beyond_the_context_is_skipped_and_says_so(pico_tokenizer):
    near, far = recall(
        Oracle(pico_tokenizer, positions=512), pico_tokenizer, FILLER, [(1, 40), (1, 1800)], items_per_case=2
    )
    assert near.exact_match == 1.0
    assert far.exact_match is None and far.n == 0 and "the model has 512" in far.skipped


def test_a_case_beyond_the_text_is_skipped_and_says_so(pico_tokenizer):
    near, far = recall(Oracle(pico_tokenizer), pico_tokenizer, FILLER[:500], [(1, 40), (1, 1800)], items_per_case=2)
    assert near.exact_match == 1.0
    assert far.exact_match is None and far.n == 0
    assert far.skipped == "needs 1824 tokens of text around the facts, the text has 500"


PROMPTS = [[5, 6, 7], list(range(2, 22)), [9] * 11]


def greedy_without_cache(model, prompt, tokens):
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_decoding_goes_through_the_cache_whatever_the_checkpoint_says(converted):
    model, widths = converted("lolcats"), []
    model.generation_config.use_cache = False
    model.generation_config.eos_token_id = None
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    generate_greedily(model, [[5, 6, 7]], tokens=4, pad=1)
    assert widths == [3, 1, 1, 1]


@pytest.mark.parametrize("teacher", [False, True], ids=["mixers", "teacher path"])
def test_padded_batch_decodes_what_each_prompt_gives_alone(converted, teacher):
    model = converted("lolcats", "LSL")
    model.generation_config.eos_token_id = None
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    if teacher:
        with teacher_path(model):
            expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
            assert generate_greedily(model, PROMPTS, tokens=12, pad=1) == expected
    else:
        assert generate_greedily(model, PROMPTS, tokens=12, pad=1) == expected


def test_penalties_of_the_checkpoint_do_not_count(pico_model):
    model = pico_model()
    plain = generate_greedily(model, PROMPTS, tokens=12, pad=1)
    assert any(len(set(row)) < len(row) for row in plain), "something is repeated, which a penalty would change"
    model.generation_config.repetition_penalty = 1e6
    model.generation_config.suppress_tokens = [plain[0][0]]
    assert generate_greedily(model, PROMPTS, tokens=12, pad=1) == plain
