"""Choosing layers by ablation: what a windowed layer sees, that layers which matter are found, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pico import KEYS, find_family, pico_model
from trainable import dataset, make_recipe, snapshot, write_source

from linearize.errors import UserError
from linearize.pipeline import convert
from linearize.preflight import outline, plan_of
from linearize.registry import family_of, find, keys
from linearize.select.base import Selector
from linearize.select.window_ablation import WindowAblation, looks, windowed

CAUSAL = [key for key in KEYS if find_family(key).causal]
IDS = torch.randint(2, 90, (2, 40), generator=torch.Generator().manual_seed(1))
ROW = 168
"""Tokens of a row with room for a question."""


def selector(key: str = "llama", model: Any = None, **settings: Any) -> WindowAblation:
    family = find_family(key) if model is None else family_of(model.config)
    config = {"window": 4, "tokens": 2 * ROW, "questions": 2, "facts": [1], **settings}
    return WindowAblation(WindowAblation.Config.model_validate(config), family)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
@torch.no_grad()
def test_a_windowed_layer_is_a_sliding_one(kernel: str, inputs: str) -> None:
    """Against the window that Mistral's own configuration asks for."""
    wide = pico_model("mistral", attn_implementation=kernel, sliding_window=None)
    narrow = pico_model("mistral", attn_implementation=kernel, sliding_window=5)
    given: dict[str, Any] = {"input_ids": IDS}
    real = torch.ones_like(IDS, dtype=torch.bool)
    if inputs == "padded":
        real[0, :7] = False
        given["attention_mask"] = real.long()
    if inputs == "packed":
        given["position_ids"] = torch.cat([torch.arange(23), torch.arange(17)]).expand(2, -1)
    before = wide(**given, use_cache=False).logits
    with windowed(wide, find_family("mistral"), range(3), 5):
        found = wide(**given, use_cache=False).logits
    torch.testing.assert_close(found[real], narrow(**given, use_cache=False).logits[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[real], before[real], atol=1e-3)
    assert torch.equal(wide(**given, use_cache=False).logits, before), "nothing is left behind"


@pytest.mark.parametrize("key", CAUSAL)
def test_the_layer_that_matters_is_found(key: str, pico_tokenizer: Any, tmp_path: Path) -> None:
    """Of every family: all layers but one add nothing to the stream, so that losing their sight harms nothing."""
    model = pico_model(key)
    chooser = selector(key, model, keep=1)
    matters = chooser.candidates(model.config)[-1]
    with torch.no_grad():
        for index, attn in enumerate(chooser.family.attentions(model).values()):
            if index != matters:
                for p in chooser.family.output_projection(attn).parameters():
                    p.zero_()
    data = dataset(tmp_path, pico_tokenizer, seq_len=ROW)
    before = snapshot(model)
    choice = chooser.choose(model, pico_tokenizer, data)
    assert choice.kept == (matters,)
    for played in choice.rounds:
        harm = played.scores.pop(matters)
        assert harm > 1e-3 and all(abs(score) < 1e-5 for score in played.scores.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_that_see_no_further_are_no_candidates() -> None:
    model = pico_model("gemma2")  # layers 0 and 2 see 12 tokens
    assert selector("gemma2", window=11).candidates(model.config) == [0, 1, 2]
    assert selector("gemma2", window=12).candidates(model.config) == [1]
    with pytest.raises(UserError, match=r"layers.keep: 2 would keep 2 layers, of 3 .* and 1 that window_ablation may"):
        selector("gemma2", window=12, keep=2).check(model.config, ROW)


@pytest.mark.parametrize(("left", "wanted", "expected"), [(6, 1, 6 + 4 + 3 + 2), (8, 2, 8 + 5 + 4 + 3), (4, 4, 0)])
def test_surplus_is_halved_in_rounds(left: int, wanted: int, expected: int) -> None:
    assert looks(left, wanted) == expected


def test_the_plan_tells_what_the_choice_reads(
    tmp_path: Path, pico_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the tokens that the model then reads, but for the first look at the source itself."""
    write_source(tmp_path, pico_model("llama"), pico_tokenizer)
    layers = {"type": "window_ablation", "keep": 1, "window": 4, "facts": [1], "tokens": 2 * ROW + 5, "questions": 3}
    sections: dict[str, Any] = {"data": {"source": str(tmp_path / "train.jsonl"), "seq_len": ROW}, "layers": layers}
    recipe = make_recipe(tmp_path, stages=[], evaluation=None, **sections)
    told = "            in 5 looks, each at 336 tokens of text and 3 questions of about 168, 4,200 tokens in all"
    assert told in outline(recipe, plan_of(recipe)).splitlines()
    assert told in plan_of(recipe).before_choice().splitlines()
    read: list[int] = []
    hidden = WindowAblation._hidden

    def counted(self: Any, model: Any, inputs: Any, asked: Any) -> torch.Tensor:
        read.append(inputs["input_ids"].numel())
        return hidden(self, model, inputs, asked)

    monkeypatch.setattr(WindowAblation, "_hidden", counted)
    said: list[str] = []
    convert(recipe, tmp_path / "out", say=said.append)
    assert len(read) == 6 * (2 + 3) and sum(read) * 5 / 6 == pytest.approx(4200, rel=0.1)
    assert told in said[0] and told not in said[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, r"layers.keep: must be a share below 1 or a whole number of layers, got 1.5"),
        ({"keep": 0}, r"layers.keep: "),
        ({"keep": True}, r"layers.keep: must be a share below 1, such as 0.25, or a number of layers, got True"),
        ({"keep": "half"}, r"layers.keep: must be a share below 1, such as 0.25, or a number of layers, got 'half'"),
        ({"facts": [0]}, r"layers.facts.0: .*greater than or equal to 1"),
        ({"seq_len": 60}, r"needs rows of more than 192 for that, got 60; raise layers.seq_len, or lower layers.facts"),
        ({"keep": 3}, r"layers.keep: 3 would keep 3 layers, of 3 that the model has .* keep at most 2"),
        ({"window": 20}, r"needs rows of more than 148 for that, got 32; raise data.seq_len"),
        ({"widow": 20}, r"unknown key 'layers.widow'; did you mean 'window'"),
        ({"type": "window_ablating"}, r"unknown selector 'window_ablating'; did you mean 'window_ablation'"),
    ],
)
def test_errors(settings: dict[str, Any], message: str, tmp_path: Path, pico_tokenizer: Any) -> None:
    write_source(tmp_path, pico_model("llama"), pico_tokenizer)
    layers = {"type": "window_ablation", "keep": 1, "facts": [1], **settings}
    with pytest.raises(UserError, match=message):
        plan_of(make_recipe(tmp_path, layers=layers))


def test_too_little_text_is_refused_with_its_size(tmp_path: Path, pico_tokenizer: Any) -> None:
    data = dataset(tmp_path, pico_tokenizer, seq_len=ROW)
    chooser = selector(seq_len=100 * ROW)
    with pytest.raises(UserError, match=r"facts in 16,800 tokens of training text, and there are [0-9,]+; give more"):
        chooser.choose(pico_model("llama"), pico_tokenizer, data)


def test_an_encoder_gets_no_choice() -> None:
    with pytest.raises(UserError, match="Bert models do not; give a pattern"):
        selector("bert").check(pico_model("bert").config, ROW)


@pytest.mark.parametrize("key", keys("select"))
def test_a_conversion_keeps_the_chosen_layers_and_its_choice(
    key: str, tmp_path: Path, pico_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path, pico_model("llama"), pico_tokenizer)
    data = {"source": str(tmp_path / "train.jsonl"), "seq_len": 256}
    recipe = make_recipe(tmp_path, layers={"type": key, "keep": 2}, stages=[], evaluation=None, data=data)
    if key == "window_ablation":
        recipe = make_recipe(
            tmp_path,
            layers={"type": key, "keep": 2, "window": 4, "facts": [1]},
            stages=[],
            evaluation=None,
            data={**recipe.data.model_dump(), "seq_len": ROW},
        )
    said: list[str] = []
    plan = plan_of(recipe)
    assert plan.chooser == key and sum(layer.mixer is None for layer in plan.layers) == 2
    out = convert(recipe, tmp_path / "out", say=said.append)
    kept = json.loads((out / "run" / "layers.json").read_text())["kept"]
    written = json.loads((out / "config.json").read_text())["linearize"]["layers"]
    assert [i for i, mixer in enumerate(written) if mixer is None] == kept and len(kept) == 2
    assert f", for example: {key} chooses which" in outline(recipe, plan), "what a dry run prints"
    assert f"2 of 3 keep softmax: {key} chooses which" in said[0] and "stage" not in said[0]
    printed = [text for text in said if "\nlayers      1 of 3 swapped: " in text]
    assert printed == [said[1]] and " chooses which" not in said[1], "the plan, once"
    monkeypatch.setattr(find("select", key, Selector), "choose", None)
    (out / "config.json").unlink()
    assert convert(recipe, out, resume=True, say=said.append) == out, "the choice is not made again"
    assert json.loads((out / "config.json").read_text())["linearize"]["layers"] == written
    assert yaml.safe_load((out / "run" / "recipe.yaml").read_text())["layers"]["type"] == key
    exported = yaml.safe_load((out / "recipe.yaml").read_text())["layers"]
    assert exported == [i for i in range(3) if i not in kept], "which gives the same layers again"
