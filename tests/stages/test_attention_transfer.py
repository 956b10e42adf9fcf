"""Attention transfer against a teacher with plain hooks and one backward over everything, and what it leaves alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from stage_cases import KINDS, batch_of, teacher_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainable import dataset, make_stage, metrics, snapshot

from linearize.errors import UserError
from linearize.swap import swapped

LAYERS = "LSL"


def layer_batch_of(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """What the converted model tells its attention about padding and documents."""
    seen: list[Any] = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["linearize_batch"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, use_cache=False)
    hook.remove()
    return seen[0]


def hedgehog_weights(attn: Any, x: torch.Tensor, rotary: Any, documents: torch.Tensor) -> torch.Tensor:
    """[B, H, T, T] phi(q_i).phi(k_j) over visible j, rows normalised."""
    q, k = attn.family.normed(attn, *attn.family.project(attn, x)[:2])
    q, k = attn.family.rotate(attn, q, k, rotary)
    q, k = attn.mixer.map_q(q), attn.mixer.map_k(k.repeat_interleave(2, dim=2))
    place = torch.arange(x.shape[1])
    visible = (place[:, None] >= place) & (documents[:, :, None] == documents[:, None, :])
    scores = torch.einsum("bihf,bjhf->bhij", q, k) * visible[:, None]
    return scores / scores.sum(-1, keepdim=True)


def reference_loss(model: Any, source: Any, batch: dict[str, torch.Tensor], loss: str, where: str) -> torch.Tensor:
    """The stage's summed loss over all swapped layers, written out."""
    mask, positions = batch.get("attention_mask"), batch["position_ids"]
    layer_batch = layer_batch_of(model, batch)
    keep = torch.ones(4, 32) if mask is None else mask.float()
    total = torch.zeros(())
    for i, teacher in teacher_run(source, batch).items():
        if LAYERS[i] == "S":
            continue
        attn = model.model.layers[i].self_attn
        heads: list[torch.Tensor] = []
        hook = attn.o_proj.register_forward_pre_hook(lambda m, args, heads=heads: heads.append(args[0]))
        output = attn(teacher["x"], position_embeddings=teacher["rotary"], linearize_batch=layer_batch)[0]
        hook.remove()
        if loss == "weights":
            documents = (positions == 0).cumsum(1)
            student = hedgehog_weights(attn, teacher["x"], teacher["rotary"], documents)
            per_token = -(teacher["weights"] * student.clamp_min(1e-9).log()).sum(-1).mean(1)
        else:
            a, b = (heads[0], teacher["heads"]) if where == "heads" else (output, teacher["output"])
            if loss == "mse":
                per_token = (a - b).square().mean(-1)
            else:
                parts = (4, 32, 4, 8) if where == "heads" else (4, 32, 1, 32)
                a, b = a.reshape(parts), b.reshape(parts)
                per_token = (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean(-1)
        total = total + (per_token * keep).sum()
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mixer", "loss", "where"),
    [
        ("lolcats", "mse", "heads"),
        ("lolcats", "mse", "output"),
        ("lolcats", "cosine", "heads"),
        ("lolcats", "cosine", "output"),
        ("hedgehog", "weights", "heads"),
    ],
)
def test_gradients_are_those_of_one_backward_over_all_layers(
    converted: Callable[..., Any],
    pico_model: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    mixer: str,
    loss: str,
    where: str,
    kind: str,
) -> None:
    batch = batch_of(kind, tmp_path, pico_tokenizer)
    model, source = converted(mixer, LAYERS), pico_model(attn_implementation="eager")
    stage = make_stage("attention_transfer", loss=loss, where=where, loss_scale=10.0)
    for p in model.parameters():
        p.requires_grad_(False)
    parameters = stage.prepare(model)
    for p in parameters.values():
        p.requires_grad_(True)
    expected_loss = reference_loss(model, source, batch, loss, where)
    expected = torch.autograd.grad(expected_loss, parameters.values())
    expected_loss = expected_loss.detach()
    items = stage.count(batch)
    assert items == (int(batch["attention_mask"].sum()) if kind == "padded" else 4 * 32)
    found = stage.backward(model, batch, 1 / items)
    assert float(found["loss"]) == pytest.approx(10 * float(expected_loss) / 2, rel=1e-4)
    assert float(found["layer_0"] + found["layer_2"]) == pytest.approx(10 * float(expected_loss), rel=1e-4)
    for (name, p), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(
            p.grad, gradient * 10 / items, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert gradient.abs().max() > 1e-3
    assert all(p.grad is None for name, p in model.named_parameters() if name not in parameters)


@pytest.mark.parametrize("loss", ["mse", "weights"])
def test_the_target_stays_the_sources_where_projections_train(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, loss: str
) -> None:
    """What the student's queries and keys have become must not move what they are compared with."""
    batch, model = batch_of("packed", tmp_path, pico_tokenizer), converted("hedgehog", LAYERS)
    stage = make_stage("attention_transfer", loss=loss, train=["*.self_attn.*"])
    stage.keep_source = True
    _, parameters = stage.begin(model)
    targets: list[list[torch.Tensor]] = [[], []]
    layer_loss = type(stage).layer_loss
    for seen, factor in zip(targets, (1.0, 0.5), strict=True):
        for name, p in parameters.items():
            p.data *= factor if "q_proj" in name else 1.0

        def spy(attn: Any, call: Any, target: Any, keep: Any, seen: Any = seen) -> Any:
            seen.append(target.clone())
            return layer_loss(stage, attn, call, target, keep)

        stage.layer_loss = spy
        stage.backward(model, batch, 1.0)
    assert len(targets[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*targets, strict=True))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_accumulation_changes_nothing(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, packing: bool
) -> None:
    data = dataset(tmp_path, pico_tokenizer, packing=packing)
    results = []
    for micro in (4, 2, 1):
        model = converted("lolcats", LAYERS)
        make_stage("attention_transfer", steps=3, micro_batch_size=micro).run(model, data, tmp_path / str(micro))
        results.append(model.state_dict())
        for a, b in zip(metrics(tmp_path / "4"), metrics(tmp_path / str(micro)), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)  # Adam alone would not see its scale
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=1e-6)


def test_only_mixers_change_and_the_loss_falls(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    model = converted("lolcats", LAYERS)
    before = snapshot(model)
    stage = make_stage("attention_transfer", steps=60, lr=0.1)
    seconds = stage.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (".mixer." in name), name
    assert not model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 60
    assert sum(losses[-5:]) < sum(losses[:5]) / 3
    assert seconds > 0
    assert [path.name for path in (tmp_path / "run").glob("*.safetensors")] == ["result.safetensors"]


def test_teacher_has_no_dropout(converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path) -> None:
    data = dataset(tmp_path, pico_tokenizer)
    results = []
    for dropout in (0.0, 0.5):
        model = converted("lolcats", LAYERS, attention_dropout=dropout)
        make_stage("attention_transfer").run(model, data, tmp_path / str(dropout))
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_bfloat16_weights_train_in_float32_and_stay_bfloat16(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path
) -> None:
    data = dataset(tmp_path, pico_tokenizer)
    model = converted("lolcats", LAYERS).to(torch.bfloat16)
    before = snapshot(model)
    stage = make_stage("attention_transfer", steps=20, lr=1e-4, schedule="constant")
    stage.run(model, data, tmp_path / "run")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    weights = [name for name in before if name.endswith("map_q.weight")]
    # steps of 1e-4 on weights around 1 are lost in bfloat16, where neighbours are 4e-3 apart
    changed = [(model.state_dict()[name] != before[name]).float().mean() for name in weights]
    assert min(changed) > 0.1


@pytest.mark.parametrize(
    ("mixer", "settings", "message"),
    [
        ("liger", {}, "nothing to train: Liger adds no parameters; remove the stage"),
        ("lolcats", {"train": ["*.mixer.map_z.*"]}, "train pattern '\\*.mixer.map_z.\\*' matches nothing that trains"),
        (
            "lolcats",
            {"train": ["lm_head.*"]},
            "trains swapped layers' attention only, and pattern 'lm_head.\\*' matches",
        ),
    ],
)
def test_nothing_sensible_to_train(
    converted: Callable[..., Any], mixer: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_stage("attention_transfer", **settings).check(converted(mixer, LAYERS))


@pytest.mark.parametrize("settings", [{"loss": "weights", "where": "output"}, {"gradient_checkpointing": True}])
def test_requests_without_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="leave it out"):
        make_stage("attention_transfer", **settings)


class PeakBytes(TorchDispatchMode):
    """Largest sum of the storages that were made inside and are alive at once; those of `model` do not count."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        self.model = [t.untyped_storage() for t in tensors]
        self.alive = {id(storage): 0 for storage in self.model}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += self.alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


@pytest.mark.parametrize("where", ["heads", "output"])
def test_peak_memory_does_not_grow_with_depth(converted: Callable[..., Any], where: str) -> None:
    batch = {"input_ids": torch.randint(2, 97, (4, 64))}
    batch |= {"labels": batch["input_ids"], "position_ids": torch.arange(64).expand(4, -1)}
    peaks: dict[str, list[int]] = {"attention_transfer": [], "finetune": []}
    for depth in (4, 16):
        model = converted("lolcats", "L" * depth)
        for p in model.parameters():
            p.requires_grad_(False)
        for attn in swapped(model).values():
            for p in attn.mixer.parameters():
                p.requires_grad_(True)
                p.grad = torch.zeros_like(p)  # not counted: gradients do grow with depth
        for key, settings in (("attention_transfer", {"where": where}), ("finetune", {"train": ["*.mixer.*"]})):
            with PeakBytes(model) as memory:
                make_stage(key, **settings).backward(model, batch, 1.0)
            peaks[key].append(memory.peak)
    assert peaks["attention_transfer"][1] / peaks["attention_transfer"][0] < 1.2
    assert peaks["finetune"][1] / peaks["finetune"][0] > 3, "the same measure sees what an end-to-end backward keeps"
    assert peaks["attention_transfer"][1] < peaks["finetune"][1] / 4


@pytest.mark.parametrize("key", ["attention_transfer", "matrix_align"])
def test_nothing_to_train_is_refused(converted: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"stage {key} trains nothing; set train: .mixer."):
        make_stage(key, train=[], lr=1e-3).check(converted("gdn", LAYERS))


def test_one_name_is_a_list_of_one() -> None:
    assert (
        make_stage("finetune", train="attention").config.train
        == make_stage("finetune", train=["attention"]).config.train
    )
