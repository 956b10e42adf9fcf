"""Models with a table of positions are measured within it, rotary ones beyond what they were trained for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from linearize.errors import UserError
from linearize.evals.config import EvalConfig
from linearize.evals.evaluate import evaluate
from linearize.evals.measure import measure
from linearize.evals.recall_score import CASES
from linearize.positions import learned

QUICK: dict[str, Any] = {"windows": 2, "recall_items": 2, "device": "cpu"}


@pytest.mark.parametrize("key", sorted({*pico.KEYS, *pico.ENCODERS}))
def test_only_tables_of_positions_end(key: str) -> None:
    assert learned(pico.pico_model(key)) == (512 if key in ("gpt2", "bert") else None)


def test_of_an_architecture_without_a_family_the_modules_tell() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM, OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}
    opt = OPTConfig(**sizes, ffn_dim=16, max_position_embeddings=64, word_embed_proj_dim=16)
    assert learned(OPTForCausalLM(opt)) == 64
    rotary = GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=64, rotary_dim=4)
    assert learned(GPTJForCausalLM(rotary)) is None, "a vocabulary of as many words is no table of positions"


@pytest.fixture
def folder_of(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> Callable[[str, int], Path]:
    """Factory (family, training length) -> checkpoint of 512 positions, beside its source and 1,500 tokens of text."""
    from linearize.hf.export import export

    def make(family: str, seq_len: int) -> Path:
        source, text = tmp_path / "source", tmp_path / "held.txt"
        for part in (pico.pico_model(family), pico_tokenizer):
            part.save_pretrained(source)
        folder = Path(export(converted("lolcats", "LSL", family=family), pico_tokenizer, tmp_path / "student"))
        text.write_text("".join(chr(97 + i * i % 26) for i in range(1500)))
        recipe = f"model: {{name: {source}}}\ndata: {{seq_len: {seq_len}}}\nevaluation: {{text: {text}}}\n"
        (folder / "recipe.yaml").write_text(recipe)
        return folder

    return make


@pytest.mark.parametrize(("seq_len", "lengths"), [(200, [200, 400]), (400, [400, 512]), (512, [512])])
def test_default_lengths_stay_within_a_table(
    seq_len: int, lengths: list[int], folder_of: Callable[[str, int], Path]
) -> None:
    probes = ["kl_by_position", "gates", {"type": "generation_agreement", "prompts": 2, "tokens": 4}]
    prompt = {"sample_prompt": "x" * 500, "probes": probes if seq_len == 512 else []}
    found = evaluate(folder_of("gpt2", seq_len), **prompt, **QUICK)
    for measured in (found.student, found.teacher):
        assert measured is not None and [point.length for point in measured.losses] == lengths
        asked = {(r.facts, r.distance) for r in measured.recall if r.exact_match is not None}
        assert asked == {(1, 200)} and len(measured.recall) == len(CASES)
        assert sum("the model has 512" in note and "was not asked" in note for note in measured.notes) == 4
        assert measured.sample is not None and len(measured.sample) <= 12
    assert {branch.length for branch in found.student.branches} == {*lengths}


def test_rotary_positions_go_on(folder_of: Callable[[str, int], Path]) -> None:
    found = evaluate(folder_of("llama", 400), recall=False, **QUICK)
    assert [point.length for point in found.student.losses] == [400, 800]
    assert any("800 is beyond the 512 positions" in note for note in found.student.notes)


def test_lengths_beyond_a_table_are_an_error(pico_tokenizer: Any, folder_of: Callable[[str, int], Path]) -> None:
    said: list[str] = []
    folder = folder_of("gpt2", 200)
    with pytest.raises(UserError, match=r"lengths: 513, 600 is beyond the 512 positions .* choose lengths up to 512"):
        evaluate(folder, lengths=[512, 513, 600], say=said.append, **QUICK)
    assert not said, "nothing was measured"
    text = torch.randint(3, 97, (2000,))
    with pytest.raises(UserError, match=r"lengths: 600 is beyond"):
        measure(pico.pico_model("gpt2"), pico_tokenizer, EvalConfig(lengths=[600]), token_ids=text, seq_len=64)


def test_a_prompt_as_long_as_the_table_is_not_continued(pico_tokenizer: Any) -> None:
    config = EvalConfig(lengths=[32], windows=1, recall=False, sample_prompt="y" * 512)
    found = measure(pico.pico_model("gpt2"), pico_tokenizer, config, token_ids=torch.arange(3, 97), seq_len=32)
    assert found.sample is None
    assert found.notes == ["the prompt was not continued: it has 512 tokens, the model 512 positions"]
