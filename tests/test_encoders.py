"""Encoders: linear attention in both directions, against the formula, with padding, through a conversion and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from hf.test_export import ids as given
from hf.test_export import in_clean_process
from trainable import recipe_dict
from transformers import AutoModel, BertForMaskedLM

from linearize import registry
from linearize.errors import UserError
from linearize.evals.agreement import agreement
from linearize.hf.auto import linearized
from linearize.hf.export import export
from linearize.hf.load import load
from linearize.mixers.base import build_mixer
from linearize.ops.layout import expand_heads
from linearize.ops.linear import bidirectional_linear_attention
from linearize.pipeline import convert
from linearize.plan import make_plan
from linearize.recipe import Recipe
from linearize.stages.finetune import Finetune, FinetuneConfig
from linearize.swap import swapped, teacher_path

BOTH_WAYS = ("based", "hedgehog", "t2r")
ids = torch.randint(2, 97, (2, 19), generator=torch.Generator().manual_seed(1))
every_encoder = pytest.mark.parametrize("family", pico.ENCODERS)


def encoder(family: str = "bert", mixer: str = "hedgehog", layers: str = "LLL") -> Any:
    model = pico.pico_model(family)
    linearized(model, {"mixers": [{"type": mixer}], "layers": [0 if letter == "L" else None for letter in layers]})
    noise = torch.Generator().manual_seed(0)
    for name, attn in swapped(model).items():
        attn.mixer.initialise(f"{name}.mixer", seed=0)
        for parameter in attn.mixer.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    return model


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("T", [1, 13, 17, 50, 70])
def test_grouped_heads_equal_expanded_heads_bit_for_bit(T: int, kv_heads: int, B: int) -> None:
    q, k, v = torch.rand(B, T, 4, 31), torch.rand(B, T, kv_heads, 31), torch.randn(B, T, kv_heads, 25)
    expanded = bidirectional_linear_attention(q, expand_heads(k, 4), expand_heads(v, 4))
    grouped = bidirectional_linear_attention(q, k, v)
    assert all(torch.equal(x, y) for x, y in zip(grouped, expanded, strict=True))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_operator_is_its_formula_in_values_and_gradients(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 13, 4, 6), (2, 13, kv_heads, 6), (2, 13, kv_heads, 5)]
    inputs = [torch.rand(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    mask = torch.arange(13) < torch.tensor([[13], [8]])
    q, k, v = inputs
    weights = torch.einsum("bihf,bjhf->bhij", q, k.repeat_interleave(4 // kv_heads, 2)) * mask[:, None, None, :]
    num = torch.einsum("bhij,bjhv->bihv", weights, v.repeat_interleave(4 // kv_heads, 2))
    found = bidirectional_linear_attention(q, k, v, mask=mask)
    for a, b in zip(found, (num, weights.sum(-1).transpose(1, 2)), strict=True):
        torch.testing.assert_close(a, b)
        mine, truth = (
            torch.autograd.grad(x.square().sum(), inputs, retain_graph=True, allow_unused=True) for x in (a, b)
        )
        for x, y in zip(mine, truth, strict=True):
            assert (x is None and y is None) or torch.allclose(x, y)


@every_encoder
@pytest.mark.parametrize("mixer", BOTH_WAYS)
@torch.no_grad()
def test_padding_changes_nothing_and_every_token_counts(family: str, mixer: str) -> None:
    model = encoder(family, mixer).double()
    alone = model(ids[:, :12]).last_hidden_state
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        where = slice(7, None) if side == "left" else slice(0, 12)
        padded[:, where], mask[:, where] = ids[:, :12], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=positions).last_hidden_state
        torch.testing.assert_close(found[:, where], alone, atol=1e-10, rtol=1e-10)
    changed = ids[:, :12].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 97
    assert (model(changed).last_hidden_state[:, 0] != alone[:, 0]).any(dim=-1).all()


@every_encoder
@torch.no_grad()
def test_the_teachers_path_is_the_source(family: str) -> None:
    source, model = pico.pico_model(family), encoder(family)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    with teacher_path(model):
        assert torch.equal(model(ids, attention_mask=mask)[0], source(ids, attention_mask=mask)[0])
    assert not torch.equal(model(ids)[0], source(ids)[0])


def test_mixers_that_read_backwards_alone_are_refused() -> None:
    config = pico.pico_config("bert")
    for key in registry.keys("mixers"):
        if key == "composed":
            continue
        recipe = Recipe.load(f"default/{key}", "somewhere/model")
        if key in BOTH_WAYS:
            make_plan(recipe, copy.deepcopy(config))
        else:
            with pytest.raises(UserError, match=f"mixer '{key}' cannot serve layer 0: this layer reads in both"):
                make_plan(recipe, copy.deepcopy(config))
    shape = pico.find_family("bert").shape(config, 0)
    cls = registry.find_class("mixers", "lolcats")
    with pytest.raises(ValueError, match="reads in both directions"):
        build_mixer(cls, cls.Config(), shape)


def encoder_recipe(folder: Path, **sections: Any) -> Recipe:
    values = recipe_dict(folder, mixer={"type": "hedgehog"}, layers="all", **sections)
    transfer = {"type": "attention_transfer", "tokens": 4096, "batch_size": 4, "loss": "weights", "loss_scale": 1.0}
    values["stages"] = [{**transfer, "lr": 1e-2}]
    return Recipe.model_validate(values)


def test_a_conversion_brings_the_embeddings_closer_and_reloads(
    pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    for part in (pico.pico_model("bert"), pico_tokenizer):
        part.save_pretrained(tmp_path / "source")
    evaluation = {"text": str(tmp_path / "train.jsonl"), "lengths": [32], "windows": 8}
    said: list[str] = []
    out = convert(encoder_recipe(tmp_path, evaluation=evaluation), tmp_path / "out", say=said.append)
    table = next(text for text in said if "embeddings agree 32" in text)
    model = AutoModel.from_pretrained(out)
    text = torch.randint(2, 97, (400,), generator=torch.Generator().manual_seed(2))
    before = agreement(encoder(), text, length=32)
    after = agreement(model, text, length=32)
    assert before.token < after.token <= 1 and after.windows == 12
    assert "an encoder writes nothing" in table
    values = [
        [float(x) for x in row.split("|")[2:4]] for row in table.splitlines() if row.startswith(("| untr", "| after"))
    ]
    assert values[0][1] < values[1][1]


def test_finetuning_is_refused() -> None:
    finetune = Finetune(FinetuneConfig.model_validate({"tokens": 10, "lora": {"r": 2}}), pico.find_family("bert"))
    with pytest.raises(UserError, match="finetune is for models that predict the next token, and Bert models see it"):
        finetune.check(encoder())


def test_an_encoder_reloads_in_a_clean_process(pico_tokenizer: Any, tmp_path: Path) -> None:
    model = encoder(layers="LSL")
    folder = export(model, pico_tokenizer, tmp_path / "bert")
    results = in_clean_process(tmp_path, [folder])
    with torch.no_grad():
        assert torch.equal(results["bert.logits"], model(given())[0])


def test_an_encoder_that_was_saved_with_a_head_is_named(tmp_path: Path, pico_tokenizer: Any) -> None:
    BertForMaskedLM(pico.pico_config("bert")).save_pretrained(tmp_path)
    pico_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a BertModel needs, .* saved as BertForMaskedLM, .* a checkpoint of BertModel"):
        load(tmp_path)
