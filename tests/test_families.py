"""Every family, found by itself: shapes, projections, rotation, plans, LoRA targets, training, export and reload."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import KEYS, PRESETS, cases, find_family, pico_config, pico_model
from trainable import make_recipe, write_source
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlavaProcessor

from linearize import registry
from linearize.batch import NO_BATCH
from linearize.hf.auto import linearized
from linearize.mixers.composed import Composed, ComposedConfig
from linearize.pipeline import convert
from linearize.plan import make_plan
from linearize.recipe import Recipe
from linearize.stages.base import Stage
from linearize.swap import Call, swapped, teacher_path
from linearize.teacher import run_teacher, teacher_logits

every_family = pytest.mark.parametrize("key", KEYS)
ids = torch.randint(2, 90, (2, 23), generator=torch.Generator().manual_seed(1))


def converted(key: str, mixer: str = "lolcats", layers: str = "LLL", **overrides: Any) -> Any:
    model = pico_model(key, **overrides)
    description = {"mixers": [{"type": mixer}], "layers": [0 if letter == "L" else None for letter in layers]}
    linearized(model, description)
    for name, attn in swapped(model).items():
        attn.mixer.initialise(f"{name}.mixer", seed=0)
    return model


@every_family
@pytest.mark.parametrize("mask", [None, "left", "right"])
@torch.no_grad()
def test_the_teachers_heads_are_what_projection_rotation_scale_and_reach_give(key: str, mask: str | None) -> None:
    """softmax(teacher_logits) v is what the source's own attention hands to its output projection."""
    model, inputs = converted(key, attn_implementation="eager"), {"input_ids": ids}
    real = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        real[0, slice(0, 6) if mask == "left" else slice(17, None)] = False
        inputs["attention_mask"] = real.long()
    seen = []

    def see(name: str, attn: Any, call: Call, heads: torch.Tensor, output: torch.Tensor) -> None:
        logits = teacher_logits(attn, call)
        _, _, v = attn.family.project(attn, call.x)
        if call.batch.order is not None:
            v = v.gather(1, call.batch.order[:, :, None, None].expand_as(v))
        v = v.repeat_interleave(attn.mixer.shape.heads // attn.mixer.shape.kv_heads, dim=2)
        found = torch.einsum("bhij,bjhv->bihv", logits.softmax(-1), v.float()).flatten(2)
        if call.batch.inverse is not None:
            found = found.gather(1, call.batch.inverse[:, :, None].expand_as(found))
        torch.testing.assert_close(found[real], heads[real], atol=1e-5, rtol=1e-5)
        assert attn.family.output(attn, heads).shape == output.shape
        torch.testing.assert_close(attn.family.output(attn, heads)[real], output[real], atol=1e-5, rtol=1e-5)
        seen.append(name)

    run_teacher(model, inputs, see)
    assert seen == list(swapped(model)) and len(seen) == 3


@every_family
@torch.no_grad()
def test_logits_are_made_of_hidden_states_as_the_model_makes_them(key: str) -> None:
    model = converted(key, layers="LSL")
    family = next(iter(swapped(model).values())).family
    hidden = family.base_model(model)(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(family.logits(model, hidden), model(input_ids=ids, use_cache=False).logits)


@every_family
def test_shapes_are_those_of_the_projections(key: str) -> None:
    model = converted(key)
    for layer, attn in enumerate(swapped(model).values()):
        shape = find_family(key).of(model.config, registry.find_class).shape(model.config, layer)
        assert attn.mixer.shape == shape
        q, k, v = attn.family.project(attn, torch.zeros(1, 5, shape.hidden_size))
        assert q.shape == (1, 5, shape.heads, shape.key_dim)
        assert k.shape == (1, 5, shape.kv_heads, shape.key_dim)
        assert v.shape == (1, 5, shape.kv_heads, shape.value_dim)
        normed = attn.family.normed(attn, q, k)
        assert [t.shape for t in normed] == [q.shape, k.shape]


@every_family
@pytest.mark.parametrize("source_norm", [True, False])
@torch.no_grad()
def test_mixers_see_queries_and_keys_after_the_sources_norm_if_they_ask_for_it(key: str, source_norm: bool) -> None:
    """The hook of a source's own norm gives what the mixer must get; without it, what goes into that norm."""
    model = converted(key)
    attn, seen, given = next(iter(swapped(model).values())), [], {}
    attn.mixer = Composed(ComposedConfig(source_norm=source_norm), attn.mixer.shape)
    attn.mixer.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    for name in ("q_norm", "k_norm"):
        if (norm := getattr(attn, name, None)) is not None:
            norm.register_forward_hook(lambda m, args, out, name=name: given.update({name: (args[0], out)}))
    x = torch.randn(2, 5, attn.mixer.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    rotary = getattr(attn.family.base_model(model), "rotary_emb", None)
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    wanted = (kinds[0],) if rotary is not None and key in ("gemma3_text", "gemma3") else ()
    position = (
        None if rotary is None else rotary(x, positions.expand(3, 1, 5) if key == "qwen2_5_vl" else positions, *wanted)
    )
    attn.heads(x, position, NO_BATCH)
    bare = attn.family.project(attn, x)[:2]
    for name, found, projected in zip(("q_norm", "k_norm"), seen[0], bare, strict=True):
        assert (name in given) == (source_norm and hasattr(attn, name))
        expected = given[name][1].view_as(found) if name in given else projected
        assert torch.equal(found, expected)
        assert name not in given or not torch.allclose(found, projected)


@every_family
@pytest.mark.parametrize("mixer", PRESETS)
def test_plans_count_what_a_conversion_adds(key: str, mixer: str) -> None:
    config = pico_config(key)
    before = sum(p.numel() for p in pico_model(key).parameters())
    plan = make_plan(Recipe.load(f"default/{mixer}", "somewhere/model", ["layers=[0, 2]"]), copy.deepcopy(config))
    model = converted(key, mixer, "LSL")
    assert plan.source_parameters == before
    assert plan.source_parameters + plan.new_parameters == sum(p.numel() for p in model.parameters())
    assert [layer.module for layer in plan.layers if layer.mixer] == list(swapped(model))


@every_family
def test_both_stages_train_and_touch_nothing_else(key: str) -> None:
    model = converted(key, layers="LSL")
    family = next(iter(swapped(model).values())).family
    batch = {"input_ids": ids, "labels": ids}
    source = {n: p.clone() for n, p in model.state_dict().items() if ".mixer." not in n}
    for name, settings in (
        ("attention_transfer", {}),
        ("finetune", {"lora": {"r": 2, "targets": ["q", "k", "v", "o"]}, "train": ["*.mixer.*"]}),
    ):
        cls = registry.find("stages", name, Stage)
        stage = cls(cls.Config.model_validate({"tokens": 64, "batch_size": 2, **settings}), family)
        for parameter in model.parameters():
            parameter.requires_grad_(False).grad = None
        trained = stage.prepare(model)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        loss = stage.backward(model, batch, 1.0)["loss"]
        assert torch.isfinite(loss) and loss > 0
        with_gradient = [n for n, p in trained.items() if p.grad is not None and bool(p.grad.any())]
        assert any(".mixer." in n for n in with_gradient)
        if name == "finetune":
            assert {".lora_B." in n for n in with_gradient} == {True, False}
            places = tuple(n.rpartition(".")[0] for n in family.attentions(model))
            assert all(n.removeprefix("base_model.model.").startswith(places) for n in trained if ".lora_" in n)
            assert model.config.model_type.startswith("linearized_")
    after = {n.replace(".base_layer.", "."): p for n, p in model.state_dict().items()}
    assert all(torch.equal(after[n], tensor) for n, tensor in source.items())


@every_family
@pytest.mark.parametrize("layers", ["LLL", "LSL"])
@torch.no_grad()
def test_a_saved_model_reloads_bit_equal(key: str, layers: str, tmp_path: Path) -> None:
    import transformers

    auto = getattr(transformers, find_family(key).auto_class)
    pico_model(key).save_pretrained(tmp_path / "source")  # loading it may translate names, which saving must not undo
    model = auto.from_pretrained(tmp_path / "source")
    linearized(model, {"mixers": [{"type": "gdn"}], "layers": [0 if letter == "L" else None for letter in layers]})
    for name, attn in swapped(model).items():
        attn.mixer.initialise(f"{name}.mixer", seed=0)
    model.save_pretrained(tmp_path / "converted")
    again, found = auto.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    again.save_pretrained(tmp_path / "once more")
    _, found = auto.from_pretrained(tmp_path / "once more", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # Products of experts depend on where in memory loading has put their weights; see docs/concepts.md.
    exact = {} if any(name.endswith("experts") for name, _ in model.named_modules()) else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **exact)


@every_family
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(key: str) -> None:
    """In mixers, in kept layers and on the teacher's path, with positions `[B, T]` as packed data has them."""
    model = converted(key, layers="LSL")
    rows = [[10, 1, 12], [17, 6]]
    positions = torch.tensor([[i for n in row for i in range(n)] for row in rows])

    def check() -> None:
        together = model(ids, position_ids=positions, use_cache=False).logits
        for row, lengths in enumerate(rows):
            alone = [model(piece[None], use_cache=False).logits[0] for piece in ids[row].split(lengths)]
            torch.testing.assert_close(together[row], torch.cat(alone), atol=1e-5, rtol=1e-5)
        shared = model(ids, position_ids=positions[1:], use_cache=False).logits[1]  # one row of positions serves all
        torch.testing.assert_close(shared, together[1], atol=1e-5, rtol=1e-5)

    check()
    with teacher_path(model):
        check()


@pytest.mark.parametrize(("key", "mixer", "layers"), cases(("LLL", "LSL")))
@torch.no_grad()
def test_a_row_does_not_depend_on_how_its_neighbours_are_padded(key: str, mixer: str, layers: str) -> None:
    """Bit for bit, also the source; but experts take the tokens of all rows at once, so that their products have shapes
    that depend on every row: there within 1e-5.
    """
    for model in (pico_model(key), converted(key, mixer, layers)):
        experts = any(name.endswith("experts") for name, _ in model.named_modules())
        for B, T in ((2, 13), (3, 50)):
            prompt = torch.randint(2, 90, (B, T), generator=torch.Generator().manual_seed(T))
            whole = model(prompt, attention_mask=torch.ones_like(prompt)).logits[0]
            for padding in (slice(0, 1), slice(0, T // 2), slice(0, T - 1), slice(T // 2, None), slice(1, None)):
                mask = torch.ones_like(prompt)
                mask[1:, padding] = 0
                row = model(prompt, attention_mask=mask).logits[0]
                assert torch.equal(row, whole) or (experts and (row - whole).abs().max() <= 1e-5 * whole.abs().max())


def test_attention_sees_only_its_reach() -> None:
    """The reach that a family reports is that of the mask Hugging Face makes: see the first test, which has windows."""
    reaches = {
        key: [find_family(key).of(c, registry.find_class).shape(c, i).reach for i in range(3)]
        for key in KEYS
        for c in [pico_config(key)]
    }
    assert reaches["llama"] == [None] * 3 and reaches["mistral"] == [12] * 3
    assert reaches["gemma2"] == reaches["gemma3_text"] == reaches["qwen2"] == [12, None, 12]


def images(key: str) -> dict[str, torch.Tensor]:
    """A row with one image of four tokens in front of text."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(2, 90, (1, 12), generator=generator)
    if key == "qwen2_5_vl":
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        ids = torch.cat([torch.tensor([[5, 94, 96, 96, 96, 96, 93]]), text], dim=1)
        types = (ids == 96).long()
        grid = torch.tensor([[1, 4, 4]])
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}
    side = 16 if key == "mistral3" else 8  # which merges 2 x 2 patches
    ids = torch.cat([torch.tensor([[5, *[96] * 4]]), text], dim=1)
    sizes = {"image_sizes": torch.tensor([[side, side]])} if key == "mistral3" else {}
    if key == "gemma3":
        sizes = {"token_type_ids": (ids == 96).long()}
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side, generator=generator), **sizes}


@pytest.mark.parametrize("key", [key for key in KEYS if find_family(key).auto_class == "AutoModelForImageTextToText"])
@pytest.mark.parametrize("layers", ["LLL", "LSL"])
@torch.no_grad()
def test_images_reach_the_mixers_and_the_vision_tower_stays(key: str, layers: str) -> None:
    source, model, inputs = pico_model(key), converted(key, layers=layers), images(key)
    tower = {n: p for n, p in source.state_dict().items() if "language_model" not in n}
    assert any("vision" in n or "visual" in n for n in tower)
    assert all(torch.equal(model.state_dict()[n], p) for n, p in tower.items())
    assert all("language_model" in n for n in swapped(model))
    with teacher_path(model):
        assert torch.equal(model(**inputs).logits, source(**inputs).logits)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-4)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(inputs["input_ids"])
    cached = model.generate(**inputs, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(**inputs, attention_mask=mask, use_cache=False, **options))


def test_plans_say_that_mixers_read_images_causally_where_softmax_does_not() -> None:
    family = find_family("gemma3").of(pico_config("gemma3"), registry.find_class)
    assert any("reads images causally" in c for c in family.concerns(pico_config("gemma3"), [0]))
    assert any("last 12 tokens" in c for c in family.concerns(pico_config("gemma3"), [0]))  # the text family's as well
    assert not family.concerns(pico_config("gemma3"), [])


def test_a_conversion_of_a_vision_language_model_keeps_its_processor(
    pico_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.data.dataset.HF_HOME", str(tmp_path / "hf"))
    pixels = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(pixels, pico_tokenizer, patch_size=4, image_token="<s>")
    write_source(tmp_path, pico_model("llava"), processor)
    out = convert(make_recipe(tmp_path), tmp_path / "out", say=lambda text: None)
    again = AutoProcessor.from_pretrained(out)
    assert type(again) is LlavaProcessor and again.image_processor.crop_size["height"] == 8
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.model_type == "linearized_llava" and len(swapped(model)) == 2
    assert "AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text()
    tower = {n: p for n, p in pico_model("llava").state_dict().items() if "vision_tower" in n}
    assert tower and all(torch.equal(model.state_dict()[n], p) for n, p in tower.items())
    assert torch.isfinite(model(**images("llava")).logits).all()
