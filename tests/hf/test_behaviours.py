"""A converted model goes where any Hugging Face model goes: drafted decoding, offloaded and moved caches, pipelines,
half precision, and devices that accelerate chooses.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from pico import KEYS, find_family, pico_model
from torch.utils._pytree import tree_leaves
from transformers import pipeline

from linearize import registry
from linearize.arguments import CACHES, cache_of, continued
from linearize.hf.auto import linearized, register
from linearize.hf.cache import StateLayer
from linearize.swap import swapped

NEW = 8
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.5}
"""Greedy; the penalty keeps random models from saying one token for ever."""
every_family = pytest.mark.parametrize("family", KEYS)
every_mixer = pytest.mark.parametrize("key", ["lolcats", "gdn"])
every_layout = pytest.mark.parametrize("layers", ["LLL", "LSL"])


def prompt(batch: int = 1, tokens: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 93, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The tokens that follow, `[B, NEW]`."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **OPTIONS, **options)[:, ids.shape[1] :]


def renamed(name: str) -> Any:
    """A hook that gives a module's forward its cache under this name."""

    def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {name if key in CACHES else key: value for key, value in kwargs.items()}

    return hook


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that state layers were told to forget since the list was last cleared."""
    counts: list[int] = []
    crop = StateLayer.crop

    def counted(self: StateLayer, tokens_to_remove: int) -> None:
        counts.append(-tokens_to_remove)
        crop(self, tokens_to_remove)

    monkeypatch.setattr(StateLayer, "crop", counted)
    return counts


@every_family
@every_mixer
@every_layout
def test_drafted_decoding_equals_greedy(converted: Any, removed: list[int], family: str, key: str, layers: str) -> None:
    """Prompt lookup, drafts of the softmax source, and drafts for it, of a prompt with padding on the left."""
    model = converted(key, layers, family=family, tie_word_embeddings=False)
    source = pico_model(family, tie_word_embeddings=False)
    ids = prompt(1, 7).repeat(1, 3)  # repeats, so that lookups find candidates
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    for target, options in (
        (model, {"prompt_lookup_num_tokens": 4}),
        (model, {"assistant_model": source}),
        (source, {"assistant_model": model}),
    ):
        drafted, greedy = generate(target, padded, mask, **options), generate(target, ids, use_cache=False)
        torch.testing.assert_close(drafted, greedy, msg=f"{list(options)}: {drafted}, greedy {greedy}")
    assert sum(removed) > 0  # some drafts were wrong, and the states went back


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.24"), reason="transformers refuses it")
@every_mixer
@every_layout
def test_drafted_decoding_into_static_memory(converted: Any, removed: list[int], key: str, layers: str) -> None:
    """Its masks are those of a memory with places to come; where a layer denies that, transformers leaves them out."""
    model, ids = converted(key, layers), prompt(1, 7).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 2, "cache_implementation": "static"}
    torch.testing.assert_close(generate(model, ids, **options), generate(model, ids, use_cache=False))
    assert sum(removed) > 0


@every_family
@torch.no_grad()
def test_a_model_is_pickled_and_copied(family: str) -> None:
    """Swapped and changed softmax layers, and the classes made for them, which no module defines."""
    model, ids = pico_model(family), prompt()
    owner = find_family(family)
    kept = {"log_scale": 16} if owner.causal and owner.tells_positions else {}
    linearized(model, {"mixers": [{"type": "lolcats"}], "layers": [0, None, 0], "kept": kept})
    for name, attn in swapped(model).items():
        attn.mixer.initialise(f"{name}.mixer", seed=0)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model) and type(other.config) is type(model.config)
        assert torch.equal(other(ids)[0], model(ids)[0])
        other.get_input_embeddings().weight.zero_()
        assert not torch.equal(other(ids)[0], model(ids)[0]), "it has tensors of its own"


@every_mixer
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_a_cache_of_states_can_be_offloaded(converted: Any, key: str, kind: str) -> None:
    """Transformers offloads softmax layers, from CUDA devices only; states are small and stay where they are."""
    model, ids = converted(key), prompt(2)
    greedy = generate(model, ids, use_cache=False)
    torch.testing.assert_close(generate(model, ids, cache_implementation=kind), greedy)


@every_mixer
@every_layout
@torch.no_grad()
def test_rows_of_a_cache_move(converted: Any, key: str, layers: str) -> None:
    """Beam search, contrastive search and reuse of a prompt's cache move, repeat, choose and copy rows."""
    model, ids, more = converted(key, layers), prompt(3), prompt(3, 5, seed=2)

    def following(cache: Any, more: torch.Tensor) -> torch.Tensor:
        return continued(model, cache, input_ids=more).logits

    filled = cache_of(model(ids, use_cache=True))
    for rows, move in (
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
        ([2, 1], lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
    ):
        moved = copy.deepcopy(filled)
        move(moved)
        fresh = cache_of(model(ids[rows], use_cache=True))
        torch.testing.assert_close(following(moved, more[rows]), following(fresh, more[rows]), atol=1e-4, rtol=1e-4)
    filled.reset()
    torch.testing.assert_close(following(filled, ids), model(ids).logits)


@every_mixer
@every_layout
@torch.no_grad()
def test_layers_take_the_cache_under_all_its_names(converted: Any, key: str, layers: str) -> None:
    """Transformers 5.24 calls `cache` what was `past_key_values`; under a name not known, layers forget the prompt."""
    for name in CACHES:
        model, ids = converted(key, layers), prompt()
        expected = generate(model, ids, use_cache=False)
        for attn in swapped(model).values():
            attn.register_forward_pre_hook(renamed(name), with_kwargs=True)
        assert torch.equal(generate(model, ids), expected)


@every_family
@torch.no_grad()
def test_a_cache_that_layers_cannot_find_is_refused(converted: Any, family: str) -> None:
    """A name that is not known would leave layers without their states: of a cache, or of what is told by `use_cache`
    alone, which not every architecture hands on.
    """
    model, ids = converted("gdn", "LSL", family=family), prompt()
    for attn in swapped(model).values():
        attn.register_forward_pre_hook(renamed("memory"), with_kwargs=True)
    assert model(ids, use_cache=False).logits.isfinite().all()
    with pytest.raises(ValueError, match="a cache is given as memory; a converted model needs one cache, called cache"):
        model(ids)
    for attn in swapped(model).values():
        attn.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"memory": None}), with_kwargs=True)
    if family in ("llama", "gpt2", "gpt_neox"):
        with pytest.raises(ValueError, match="layer 0 is told to use a cache, and is given none; a converted model"):
            model(ids)


@every_mixer
@every_layout
@torch.no_grad()
def test_a_dropped_cache_is_freed_at_once(converted: Any, key: str, layers: str) -> None:
    """Nothing in a cache refers back to it, which would keep it in memory until Python looks for cycles."""
    cache = cache_of(converted(key, layers)(prompt(), use_cache=True))
    held = tree_leaves([layer.state if isinstance(layer, StateLayer) else [layer.keys] for layer in cache.layers])
    tensors = [weakref.ref(tensor) for tensor in held]
    assert len(tensors) >= 3
    gc.disable()
    try:
        del cache, held
        assert not any(tensor() is not None for tensor in tensors)
    finally:
        gc.enable()


@every_mixer
@every_layout
def test_pipeline_gives_what_generate_gives(
    converted: Any, pico_tokenizer: Any, tmp_path: Path, key: str, layers: str
) -> None:
    model, pico_tokenizer.padding_side = converted(key, layers), "left"
    texts = ["hello world and", "abc", "the quick brown fox jumps over"]
    direct = []
    for text in texts:
        new = generate(model, pico_tokenizer(text, return_tensors="pt").input_ids)[0]
        direct.append(text + pico_tokenizer.decode(new, skip_special_tokens=True))
    model.save_pretrained(tmp_path)
    pico_tokenizer.save_pretrained(tmp_path)
    for source in ({"model": model, "tokenizer": pico_tokenizer}, {"model": str(tmp_path)}):
        pipe = pipeline("text-generation", **source)
        for batch_size in (1, 3):
            results = pipe(texts, batch_size=batch_size, **OPTIONS)
            assert [result[0]["generated_text"] for result in results] == direct


def reload(folder: Path, family: str, **options: Any) -> Any:
    register()
    return getattr(transformers, find_family(family).auto_class).from_pretrained(folder, **options)


@every_family
@torch.no_grad()
def test_half_precision_where_accelerate_puts_it(converted: Any, tmp_path: Path, family: str) -> None:
    model, ids = converted("gdn", "LSL", family=family), prompt(2)
    model.save_pretrained(tmp_path / "float32")
    reference = model(ids).logits
    # Logits have 8 and 11 significant bits; layers of random weights amplify what is rounded away.
    for dtype, tolerance in ((torch.bfloat16, 0.15), (torch.float16, 0.03)):
        loaded = reload(tmp_path / "float32", family, dtype=dtype, device_map="auto")
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        logits = loaded(ids.to(loaded.device)).logits
        assert logits.dtype == dtype and logits.isfinite().all()
        assert (logits.cpu().float() - reference).abs().mean() < tolerance * reference.abs().mean()
        assert generate(loaded, ids.to(loaded.device)).shape == (2, NEW)
        loaded.save_pretrained(tmp_path / "half")
        again = reload(tmp_path / "half", family, dtype="auto", device_map="auto")
        assert again.dtype == dtype and torch.equal(again(ids.to(again.device)).logits, logits)


@pytest.mark.parametrize("key", ["lolcats", "rwkv7", "gdn"])
@torch.no_grad()
def test_weights_can_stay_on_disk(converted: Any, tmp_path: Path, key: str) -> None:
    model, ids = converted(key, "LSL"), prompt(2)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.1"], "cpu")
    places |= {"model.layers.0": "disk", "model.layers.2": "disk"}
    loaded = reload(tmp_path / "model", "llama", device_map=places, offload_folder=tmp_path / "disk")
    assert any(parameter.is_meta for parameter in swapped(loaded)["model.layers.0.self_attn"].mixer.parameters())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    torch.testing.assert_close(generate(loaded, ids), generate(model, ids))


class EightBits(torch.nn.Module):
    """What a quantiser puts in a projection's place: no float weight, and none under that name."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1) / 127
        self.packed = (linear.weight / self.scale[:, None]).round().to(torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed * self.scale[:, None]).T.to(x.dtype)


@pytest.mark.parametrize("key", sorted(set(registry.keys("mixers")) - {"composed"}))
@torch.no_grad()
def test_quantised_projections_serve(converted: Any, key: str) -> None:
    """Mixers get what projections make, and never read their weights."""
    model, ids = converted(key, "LSL"), prompt(2)
    full = model(ids).logits
    for attn in (layer.self_attn for layer in model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attn, name, EightBits(getattr(attn, name)))
    found = model(ids).logits
    assert 0 < (found - full).norm() < 0.1 * full.norm()
    torch.testing.assert_close(generate(model, ids), generate(model, ids, use_cache=False))
