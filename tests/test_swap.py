"""A swap adds mixers and changes nothing else, and reads Hugging Face's masks and positions rightly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico import KEYS, cases, find_family, pico_model
from transformers import DynamicCache

from linearize import registry
from linearize.batch import Batch, read_batch
from linearize.hf.auto import find_class, linearized
from linearize.mixers.base import Mixer
from linearize.swap import _attach_batch, mixer_specs, swap_layers, swapped, teacher_path

every_mixer = pytest.mark.parametrize("key", registry.keys("mixers"))
every_family = pytest.mark.parametrize("family", KEYS)

NOTHING = Batch(None, None, None, None)

every_case = pytest.mark.parametrize(("family", "key", "_"), cases(("",)))


@pytest.fixture
def source() -> Callable[[str], Any]:
    """Factory (family key) -> the family's causal LM in pico sizes, eval mode; the same on every call."""
    return pico_model


def convert(model: Any, family: str, key: str, layers: str = "LSL") -> Any:
    index = [0 if letter == "L" else None for letter in layers]
    linearized(model, {"mixers": [{"type": key}], "layers": index})
    for name, attn in swapped(model).items():
        attn.mixer.initialise(f"{name}.mixer", seed=0)
    return model


def prompt(batch: int = 2, tokens: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return mask


@every_family
@torch.no_grad()
def test_keeping_every_layer_keeps_the_logits_bit_for_bit(source: Any, family: str) -> None:
    model, ids = source(family), prompt()
    mask = left_padding(ids)
    expected = [model(ids).logits, model(ids, attention_mask=mask).logits]
    swap_layers(model, find_family(family), [None] * 3)
    assert not swapped(model)
    kept = linearized(source(family), {"mixers": [], "layers": [None] * 3})
    for same in (model, kept):
        logits = [same(ids).logits, same(ids, attention_mask=mask).logits]
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


@every_case
@torch.no_grad()
def test_the_teacher_path_is_the_source_bit_for_bit(source: Any, family: str, key: str, _: str) -> None:
    teacher, student, ids = source(family), convert(source(family), family, key), prompt()
    packed = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(2, -1)
    options: list[dict[str, Any]] = [
        {},
        {"attention_mask": left_padding(ids)},
        {"position_ids": packed, "use_cache": False},
    ]
    for option in options:
        given = {**option}
        if "position_ids" in option:  # which the student brings into the source's form by itself
            given["position_ids"] = find_family(family).packed_positions(packed)
        expected = teacher(ids, **given).logits
        assert not torch.equal(student(ids, **option).logits, expected)
        with teacher_path(student):
            assert torch.equal(student(ids, **option).logits, expected)
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": left_padding(ids)}
    with teacher_path(student):
        assert torch.equal(student.generate(ids, **new), teacher.generate(ids, **new))


@every_mixer
@torch.no_grad()
def test_the_teacher_path_ends_with_its_context(source: Any, key: str) -> None:
    student, ids = convert(source("llama"), "llama", key), prompt()
    before = student(ids).logits
    with pytest.raises(KeyError), teacher_path(student):
        with teacher_path(student):
            teacher = student(ids).logits
        assert torch.equal(student(ids).logits, teacher)
        raise KeyError
    assert torch.equal(student(ids).logits, before) and not torch.equal(before, teacher)


@every_case
def test_a_swap_changes_no_tensor_of_the_source(source: Any, family: str, key: str, _: str) -> None:
    model = source(family)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.clone() for name, tensor in before.items()}
    names = set(model.state_dict())
    convert(model, family, key)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor and torch.equal(tensor, values[name]) for name, tensor in before.items())
    assert names <= set(model.state_dict())
    modules = list(find_family(family).attentions(model))
    assert list(swapped(model)) == [modules[0], modules[2]]
    prefixes = tuple(f"{name}.mixer." for name in swapped(model))
    assert all(name.startswith(prefixes) for name in set(after) - set(before))


@every_mixer
def test_a_subset_of_layers_starts_with_the_same_tensors(source: Any, key: str) -> None:
    everything = convert(source("llama"), "llama", key, "LLL").state_dict()
    for layers in ("SSL", "LSL"):
        some = convert(source("llama"), "llama", key, layers)
        for name, attn in swapped(some).items():
            for tail, tensor in attn.mixer.state_dict().items():
                assert torch.equal(tensor, everything[f"{name}.mixer.{tail}"])


@every_case
@torch.no_grad()
def test_one_hot_values_read_out_the_mixing_matrix(source: Any, family: str, key: str, _: str) -> None:
    T = 80
    model, ids, found = convert(source(family), family, key), prompt(2, T), []
    first = next(iter(swapped(model).values()))
    if not first.mixer.linear_in_values:
        return

    def read(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        call = first.given(args, kwargs)
        x, given = call.x, (call.x, call.position, call.batch)
        _, _, v = first.family.project(first, x)
        one_hot = torch.eye(T)[None, :, None].expand(2, -1, v.shape[2], -1)
        y, _ = first.heads(*given)
        weights, _ = first.heads(*given, values=one_hot)
        found.append((y, v.repeat_interleave(y.shape[2] // v.shape[2], dim=2), weights))

    first.register_forward_pre_hook(read, with_kwargs=True)
    mask = left_padding(ids)
    model(ids)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for (y, v, weights), real in zip(found, (torch.ones_like(mask).bool(), mask.bool()), strict=True):
        torch.testing.assert_close(torch.einsum("bths,bshv->bthv", weights, v)[real], y[real], atol=1e-5, rtol=1e-5)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1) | ~real[:, None, :]  # later tokens, and padding
        assert not weights.transpose(2, 3)[hidden & real[:, :, None]].any()


def test_mixer_specs_build_each_mixer_once() -> None:
    key = registry.keys("mixers")[0]
    description = {"mixers": [{"type": key}, {"type": key, "chunk_size": 16}], "layers": [1, None, 0, 1]}
    specs = mixer_specs(description, find_class)
    cls = registry.find("mixers", key, Mixer)
    assert specs == [(cls, cls.Config(chunk_size=16)), None, (cls, cls.Config()), (cls, cls.Config(chunk_size=16))]


def rows(*text: str) -> torch.Tensor:
    """A mask from rows like "0011"."""
    return torch.tensor([[int(c) for c in row] for row in text])


def test_without_padding_there_is_nothing_to_know() -> None:
    for mask in (None, rows("111", "111"), rows("0111", "1111")):
        assert read_batch(mask, None, 2, 3, has_past=False) == NOTHING
    assert read_batch(rows("011", "111"), None, 2, 1, has_past=True) == NOTHING


def test_right_padding_needs_no_reordering() -> None:
    batch = read_batch(rows("1100", "1111"), None, 2, 4, has_past=False)
    assert batch.mask is not None and batch.mask.dtype == torch.bool
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.order is None and batch.inverse is None and batch.documents is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_other_padding_brings_real_tokens_to_the_front_in_their_order(dtype: torch.dtype) -> None:
    batch = read_batch(rows("00111", "10110", "00000", "11111").to(dtype), None, 4, 5, has_past=False)
    assert batch.mask is not None and batch.order is not None and batch.inverse is not None
    assert batch.mask.int().tolist() == rows("11100", "11100", "00000", "11111").tolist()
    assert batch.order.tolist() == [[2, 3, 4, 0, 1], [0, 2, 3, 1, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    ids = torch.arange(20).view(4, 5)
    assert torch.equal(ids.gather(1, batch.order).gather(1, batch.inverse), ids)


def test_the_mask_of_a_piece_is_its_end() -> None:
    batch = read_batch(rows("001110", "111101"), None, 2, 3, has_past=True)
    assert batch.mask is not None and batch.mask.int().tolist() == rows("110", "110").tolist()
    assert batch.order is not None and batch.order.tolist() == [[0, 1, 2], [0, 2, 1]]


def test_a_single_token_can_be_padding() -> None:
    batch = read_batch(rows("00", "11"), None, 2, 1, has_past=True)
    assert batch.mask is not None and batch.mask.tolist() == [[False], [True]] and batch.order is None
    compiled = torch.compile(
        lambda mask: read_batch(mask, None, 2, 1, has_past=True).mask, backend="eager", fullgraph=True
    )
    for mask in (rows("00", "11"), rows("11", "01")):
        assert torch.equal(compiled(mask), mask[:, -1:].bool())


def test_positions_that_restart_begin_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    batch = read_batch(None, positions, 2, 5, has_past=False)
    assert batch.documents is not None and batch.documents.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert batch.mask is None and batch.order is None
    shared = read_batch(None, positions[:1], 3, 5, has_past=False)
    assert shared.documents is not None and shared.documents.tolist() == [[0, 0, 0, 1, 1]] * 3


def test_positions_are_read_only_where_transformers_reads_them() -> None:
    positions = torch.tensor([[0, 1, 0, 1]])
    assert read_batch(None, positions, 1, 4, has_past=True) == NOTHING
    assert read_batch(rows("1111"), positions, 1, 4, has_past=False) == NOTHING
    assert read_batch(None, torch.arange(7, 11)[None], 1, 4, has_past=False) == NOTHING
    assert read_batch(None, torch.arange(1)[None], 1, 1, has_past=False) == NOTHING


def test_head_is_what_the_first_columns_alone_would_give() -> None:
    mask = rows("00111", "10110", "11111")
    batch = read_batch(mask, None, 3, 5, has_past=False)
    for tokens in range(1, 6):
        head, expected = batch.head(tokens), read_batch(mask[:, :tokens], None, 3, tokens, has_past=False)
        for field in ("mask", "order", "inverse"):
            a, b = getattr(head, field), getattr(expected, field)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), (tokens, field)
    packed = read_batch(None, torch.tensor([[0, 1, 0, 1]]), 1, 4, has_past=False).head(3)
    assert packed.documents is not None and packed.documents.tolist() == [[0, 0, 1]]
    assert NOTHING.head(2) == NOTHING


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past"])
def test_a_cache_is_read_under_every_name_it_has_had(source: Any, name: str) -> None:
    """transformers 5.24 says `cache`, which an attention that looks for another name would silently leave empty."""
    model, cache = convert(source("llama"), "llama", "lolcats", "LLL"), DynamicCache()
    attn = next(iter(swapped(model).values()))
    hidden = torch.zeros(1, 3, model.config.hidden_size)
    assert attn.given((), {"hidden_states": hidden, name: cache}).cache is cache
    assert attn.given((), {"hidden_states": hidden, name: None}).cache is None
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    positions = torch.tensor([[0, 1, 0]])
    _, told = _attach_batch(
        model.model,
        (),
        {"input_ids": prompt(1, 3), "position_ids": positions, name: cache},
        names=(),
        family=attn.family,
    )
    assert told["linearize_batch"].documents is None, "where there is a past, positions say nothing of documents"
