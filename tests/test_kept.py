"""Kept softmax layers without rotary embedding and with logits that grow with the length, against their formula."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from hf.test_export import in_clean_process, logits
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from linearize.arguments import cache_of, continued
from linearize.errors import UserError
from linearize.hf.auto import linearized
from linearize.hf.export import export
from linearize.kept import Kept, KeptAttention, log_length
from linearize.pipeline import convert
from linearize.plan import make_plan
from linearize.preflight import plan_of
from linearize.recipe import Recipe
from linearize.swap import swap_layers, swapped, teacher_path

CHANGES = [Kept(rope=False), Kept(log_scale=6), Kept(rope=False, log_scale=6)]
every_change = pytest.mark.parametrize("kept", CHANGES, ids=str)


def ids(batch: int = 2, tokens: int = 21) -> torch.Tensor:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def changed(model: Any, kept: Kept, layers: str = "LSS") -> Any:
    """The model with gla in its L layers, and its S layers changed."""
    index = [0 if letter == "L" else None for letter in layers]
    described = {"mixers": [{"type": "gla"}], "layers": index, "kept": {"rope": kept.rope, "log_scale": kept.log_scale}}
    linearized(model, described)
    for name, attn in swapped(model).items():
        attn.mixer.initialise(f"{name}.mixer", seed=0)
    return model.eval()


def by_hand(attn: Any, x: torch.Tensor, positions: list[int], kept: Kept, theta: float) -> torch.Tensor:
    """A kept layer's output [T, C] for one row x [T, C] of one document, head by head and query by query."""
    T, size, heads = len(x), attn.head_dim, attn.config.num_attention_heads
    group = heads // attn.config.num_key_value_heads
    q, k, v = (p.weight.double() @ x.double().T for p in (attn.q_proj, attn.k_proj, attn.v_proj))

    def turned(vector: torch.Tensor, place: int) -> torch.Tensor:
        if not kept.rope:
            return vector
        half, out = size // 2, vector.clone()
        for i in range(half):
            angle = place * theta ** (-2 * i / size)
            out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
            out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
        return out

    outputs = torch.zeros(T, heads * size, dtype=torch.float64)
    for h in range(heads):
        mine, shared = slice(h * size, (h + 1) * size), slice(h // group * size, (h // group + 1) * size)
        for t in range(T):
            grows = 1.0 if kept.log_scale is None else max(1.0, math.log(positions[t] + 1) / math.log(kept.log_scale))
            query = turned(q[mine, t], positions[t])
            scores = [float(query @ turned(k[shared, i], positions[i])) * grows / math.sqrt(size) for i in range(t + 1)]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            outputs[t, mine] = sum(weights[i] * v[shared, i] for i in range(t + 1))
    return outputs @ attn.o_proj.weight.double().T


def seen_by(model: Any, layer: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output [B, T, C] of a layer's attention in a forward of the model."""
    caught: list[torch.Tensor] = []

    def catch(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        caught.extend([kwargs["hidden_states"], output[0]])

    hook = model.model.layers[layer].self_attn.register_forward_hook(catch, with_kwargs=True)
    model(**options)
    hook.remove()
    return caught[0], caught[1]


@pytest.mark.parametrize("family", pico.KEYS)
@torch.no_grad()
def test_by_default_nothing_changes(family: str) -> None:
    cls, model = pico.find_family(family), pico.pico_model(family)
    expected = model(ids()).logits
    swap_layers(model, cls, [None] * 3, Kept())
    assert not any(isinstance(m, KeptAttention) for m in model.modules())
    assert torch.equal(model(ids()).logits, expected)


def test_the_factor_is_one_up_to_the_training_length_and_grows_with_the_logarithm() -> None:
    factor = log_length(torch.arange(10_000)[None], 1000)[0]
    assert torch.equal(factor[:1000], torch.ones(1000)) and (factor[1000:] > 1).all()
    assert float(factor[9999]) == pytest.approx(4 / 3, rel=1e-6)  # log 10,000 / log 1,000


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_change
@torch.no_grad()
def test_a_kept_layer_is_its_formula(pico_model: Any, implementation: str, kept: Kept) -> None:
    model = changed(pico_model(attn_implementation=implementation), kept)
    theta = model.config.rope_parameters["rope_theta"]
    for layer in (1, 2):
        x, y = seen_by(model, layer, input_ids=ids())
        for row in range(2):
            expected = by_hand(model.model.layers[layer].self_attn, x[row], list(range(21)), kept, theta)
            torch.testing.assert_close(y[row].double(), expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(
                expected, by_hand(model.model.layers[layer].self_attn, x[row], *[list(range(21)), Kept(), theta])
            )


@every_change
@torch.no_grad()
def test_packed_documents_count_from_their_own_start(pico_model: Any, kept: Kept) -> None:
    model, lengths = changed(pico_model(), kept), [9, 12]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids(1), position_ids=positions, use_cache=False).logits
    alone = [model(piece).logits for piece in ids(1).split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


@every_change
@torch.no_grad()
def test_decoding_is_prefill(pico_model: Any, kept: Kept) -> None:
    model = changed(pico_model(), kept)
    whole = model(ids()).logits
    for pieces in ([21], [1] * 21, [5, 1, 8, 7]):
        cache, found = None, []
        for piece in ids().split(pieces, dim=1):
            out = continued(model, cache, input_ids=piece)
            cache = cache_of(out)
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=1e-5)


@every_change
@torch.no_grad()
def test_left_padding_is_not_seen(pico_model: Any, kept: Kept) -> None:
    model = changed(pico_model(), kept)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids(), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[0, 6:], model(ids()[:1, 6:]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1], model(ids()[1:]).logits[0], atol=1e-5, rtol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(ids(), attention_mask=mask, **options)
    alone = model.generate(ids()[:1, 6:], attention_mask=mask[:1, 6:], **options)
    assert torch.equal(together[0, 6:], alone[0])


@every_change
@torch.no_grad()
def test_the_teacher_path_is_the_source_bit_for_bit(pico_model: Any, kept: Kept) -> None:
    teacher, student = pico_model(), changed(pico_model(), kept)
    mask = torch.ones_like(ids())
    mask[0, :6] = 0
    before = student(ids()).logits
    for options in ({}, {"attention_mask": mask}):
        with teacher_path(student):
            assert torch.equal(student(ids(), **options).logits, teacher(ids(), **options).logits)
    assert torch.equal(student(ids()).logits, before)
    everything = changed(pico_model(), kept, "SSS")
    assert not torch.allclose(everything(ids()).logits, teacher(ids()).logits)
    with teacher_path(everything):
        assert torch.equal(everything(ids()).logits, teacher(ids()).logits)


@torch.no_grad()
def test_without_growth_in_reach_the_logits_are_the_sources_bit_for_bit(pico_model: Any) -> None:
    model = changed(pico_model(), Kept(log_scale=21), "SSS")
    assert torch.equal(model(ids()).logits, pico_model()(ids()).logits)


def test_a_lora_on_the_queries_grows_too(pico_model: Any) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(changed(pico_model(), Kept(log_scale=6)), config).eval()
    with torch.no_grad():
        expected = model(ids()).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids()).logits, expected, atol=1e-5, rtol=1e-5)
        hooks = [len(layer.self_attn.q_proj._forward_hooks) for layer in merged.model.layers]
    assert hooks == [0, 1, 1]


def test_gradients_do_not_depend_on_checkpointing(pico_model: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model = changed(pico_model(), Kept(rope=False, log_scale=6)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(), labels=ids(), use_cache=False).loss.backward()
        found.append(model.model.layers[1].self_attn.q_proj.weight.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own(pico_model: Any) -> None:
    model = changed(pico_model(), Kept(log_scale=6))
    expected, twin = model(ids()).logits, copy.deepcopy(model)
    del model
    assert torch.equal(twin(ids()).logits, expected)
    attn = twin.model.layers[1].self_attn
    assert attn.query_scale.attn is attn and attn.query_scale.module is attn.q_proj


@torch.no_grad()
def test_a_compiled_layer_gives_the_same(pico_model: Any) -> None:
    model = changed(pico_model(), Kept(rope=False, log_scale=6), "SSS")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)


def test_reloading_in_a_clean_process_gives_the_same_bits(pico_model: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    models = [changed(pico_model(), kept) for kept in CHANGES]
    folders = [export(model, pico_tokenizer, tmp_path / f"model{i}") for i, model in enumerate(models)]
    results = in_clean_process(tmp_path, folders)
    mask = torch.ones_like(results["model0.greedy"][:, :25])
    for model, folder in zip(models, folders, strict=True):
        assert torch.equal(results[f"{folder.name}.logits"], logits(model))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
        prompt = results[f"{folder.name}.greedy"][:, :25]
        greedy = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(results[f"{folder.name}.greedy"], greedy)


def demo_plan(*overrides: str) -> Any:
    return plan_of(Recipe.load("demo/lightning_h", overrides=overrides))


def test_the_plan_says_what_changes_and_the_checkpoint_stores_only_that() -> None:
    plan = demo_plan()
    assert "kept        no rotary embedding, logits times log t / log 1,024 from token 1,024 on" in str(plan)
    assert plan.description()["kept"] == {"rope": False, "log_scale": 1024}
    plain = demo_plan("kept.rope=true", "kept.log_scale=null")
    assert "kept" not in plain.description() and "\nkept" not in str(plain)


def test_a_recipe_that_keeps_no_layer_cannot_change_kept_layers() -> None:
    with pytest.raises(UserError, match=r"kept \(no rotary .*layers: 'all' keeps none; keep some with a pattern"):
        demo_plan("layers=all")
    demo_plan("layers=all", "kept.rope=true", "kept.log_scale=null")
    for wrong in ("kept.log_scale=1", "kept.log_scale=0", "kept.rope=maybe"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            demo_plan(wrong)


def test_a_family_without_rotary_embedding_has_none_to_lose() -> None:
    changes = ["layers=LLS", "kept.log_scale=null"]
    with pytest.raises(UserError, match="kept.log_scale needs .* attention of qwen2_5_vl models is not told"):
        make_plan(Recipe.load("lolcats", "demo", ["layers=LSL", "kept.log_scale=16"]), pico.pico_config("qwen2_5_vl"))
    with pytest.raises(UserError, match="kept.rope: false takes the rotary embedding .* a gpt2 model has none"):
        make_plan(Recipe.load("demo/lightning_h", overrides=changes), pico.pico_config("gpt2"))
    make_plan(Recipe.load("demo/lightning_h", overrides=[*changes, "kept.rope=true"]), pico.pico_config("gpt2"))


@pytest.mark.parametrize("family", pico.KEYS)
@torch.no_grad()
def test_every_family_scales_its_queries_and_nothing_else(family: str) -> None:
    """Logits times s: the same as attention whose scale is s times larger, which every implementation has."""
    model, scaled = pico.pico_model(family), pico.pico_model(family)
    config = {"mixers": [{"type": "hedgehog"}], "layers": [None, 0, None], "kept": {"log_scale": 4}}
    linearized(model, config)
    cls = next(iter(swapped(model).values())).family
    linearized(scaled, {**config, "kept": {"rope": True}})
    for attn in cls.attentions(scaled).values():
        attn.scaling = attn.scaling * 1.5
    seen = []
    for made in (model, scaled):
        for name, attn in swapped(made).items():
            attn.mixer.initialise(f"{name}.mixer", seed=0)
        for name in list(cls.attentions(made))[::2]:
            made.get_submodule(name).register_forward_hook(lambda m, a, k, out: seen.append(out[0]), with_kwargs=True)
        if made is model:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("linearize.kept.log_length", lambda positions, length: torch.full((1, 12), 1.5))
                made(ids(1, 12))
        else:
            made(ids(1, 12))
    for a, b in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_a_conversion_ends_in_a_checkpoint_with_changed_layers(
    pico_model: Any, pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainable import make_recipe, write_source

    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    write_source(tmp_path, pico_model(), pico_tokenizer)
    plain = convert(make_recipe(tmp_path), tmp_path / "plain", say=lambda text: None)
    assert "kept" not in AutoModelForCausalLM.from_pretrained(plain).config.linearize
    recipe = make_recipe(tmp_path, kept={"rope": False, "log_scale": 6})
    model = AutoModelForCausalLM.from_pretrained(convert(recipe, tmp_path / "out", say=lambda text: None))
    assert [isinstance(layer.self_attn, KeptAttention) for layer in model.model.layers] == [False, True, False]
    assert model.model.layers[1].self_attn.kept == Kept(rope=False, log_scale=6)
    before = pico_model().model.layers[1].self_attn.q_proj.weight
    assert not torch.equal(model.model.layers[1].self_attn.q_proj.weight, before), "its LoRA is trained"
