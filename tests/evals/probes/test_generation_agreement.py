"""The probe generation_agreement against `generate` of transformers, a prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from evals.probes.subjects import TEXT, run_probe, windows

from linearize.errors import UserError
from linearize.swap import swapped, teacher_path

PROBE = {"type": "generation_agreement", "prompts": 6, "prompt_tokens": 9, "tokens": 12}


def alone(model: Any, prompt: torch.Tensor) -> list[int]:
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    out = model.generate(input_ids=prompt[None], attention_mask=mask, max_new_tokens=12, do_sample=False)
    return out[0, len(prompt) :].tolist()


def by_hand(model: Any) -> tuple[list[int], float, list[list[int]]]:
    """Length of the common beginning for each prompt, share of the teacher's tokens, and the teacher's texts."""
    common, hits, teacher_texts = [], [], []
    with torch.no_grad():
        for prompt in windows(9, 6):
            with teacher_path(model):
                teacher = alone(model, prompt)
            student = alone(model, prompt)
            n = 0
            while n < min(len(teacher), len(student)) and teacher[n] == student[n]:
                n += 1
            common.append(12 if teacher == student else n)
            for i, token in enumerate(teacher):
                text = torch.cat([prompt, torch.tensor(teacher[:i], dtype=torch.long)])[None]
                hits.append(int(model(input_ids=text).logits[0, -1].argmax()) == token)
            teacher_texts.append(teacher)
    return common, sum(hits) / len(hits), teacher_texts


def close(model: Any) -> Any:
    """The student with layers that say little, so that it parts from its teacher at some point."""
    for attn in swapped(model).values():
        attn.o_proj.weight.data *= 0.03
    return model


def test_equals_generate_a_prompt_at_a_time(converted: Callable[..., Any], pico_tokenizer: Any) -> None:
    model = close(converted("gdn", "LSL"))
    found = run_probe(PROBE, model, pico_tokenizer)
    common, forced, texts = by_hand(model)
    assert len(set(common)) > 1, "some prompts part early and some late, or nothing is tested"
    assert found["common_prefix"] == pytest.approx(sum(common) / 6)
    assert found["identical"] == sum(n == 12 for n in common) / 6
    assert found["survival"] == [[n, sum(length >= n for length in common) / 6] for n in range(1, 13)]
    assert found["forced"] == pytest.approx(forced)
    assert found["forced_tokens"] == sum(map(len, texts))
    first, second = found["forced_curve"]
    assert (first[0], second[0]) == (8, 12)
    assert (8 * first[1] + 4 * second[1]) / 12 == pytest.approx(forced, abs=1e-6) or len(min(texts, key=len)) < 12


def test_texts_that_end(converted: Callable[..., Any], pico_tokenizer: Any) -> None:
    """Every token of the teacher's usual texts may end them: they count up to there, whatever follows in the batch."""
    model = close(converted("gdn", "LSL"))
    *_, texts = by_hand(model)
    model.generation_config.eos_token_id = [1, texts[0][3], texts[1][6]]
    common, forced, ended = by_hand(model)
    assert min(map(len, ended)) < 12
    found = run_probe(PROBE, model, pico_tokenizer)
    assert found["common_prefix"] == pytest.approx(sum(common) / 6)
    assert found["forced"] == pytest.approx(forced) and found["forced_tokens"] == sum(map(len, ended))


def test_a_student_that_is_its_teacher_agrees(converted: Callable[..., Any], pico_tokenizer: Any) -> None:
    found = run_probe(PROBE, converted("lolcats", "LSL", settings={"window": 32}), pico_tokenizer)
    assert (found["identical"], found["common_prefix"], found["forced"]) == (1.0, 12.0, 1.0)
    assert found["low"] < 1.0 == found["high"]
    assert found["survival"][-1] == [12, 1.0]


def test_another_model_can_be_the_teacher(
    converted: Callable[..., Any], pico_model: Callable[..., Any], pico_tokenizer: Any
) -> None:
    model = converted("gdn", "LSL")
    inside = run_probe(PROBE, model, pico_tokenizer)
    assert run_probe(PROBE, model, pico_tokenizer, teacher=lambda: nullcontext(pico_model(0))) == inside


def test_what_does_not_fit_is_refused(converted: Callable[..., Any], pico_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="generation_agreement .* set prompt_tokens or tokens lower"):
        run_probe(PROBE, converted("gdn", "LSL"), pico_tokenizer, text=TEXT[:20])
