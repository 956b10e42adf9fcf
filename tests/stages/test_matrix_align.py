"""Alignment of mixing matrices against matrices built column by column in float64, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stage_cases import KINDS, batch_of, teacher_run, trainable
from torch import Tensor
from trainable import dataset, make_stage, metrics, snapshot

from linearize.batch import NO_BATCH
from linearize.errors import UserError
from linearize.mixing import mixer_columns
from linearize.registry import keys
from linearize.swap import Call, swapped

LAYERS = "LSL"
REFUSED = {"deltaproduct", "ttt"}
NOT_LINEAR = {"gdn", "kda", "mamba2", "rwkv7", "lizard", "log_linear"}
"""Mixers that have a mixing matrix in their read-out alone."""


def heads_of(attn: Any, x: Tensor, documents: Tensor, name: str) -> Tensor:
    """[B, T, 4, 8] queries or keys of each query head, after the short convolution inside documents."""
    z = (x @ getattr(attn, f"{name}_proj").weight.T).view(*x.shape[:2], -1, 8)
    if attn.mixer.conv is not None:
        taps, out = attn.mixer.conv.taps(name), torch.zeros_like(z)  # [heads, 8, size]
        for t in range(x.shape[1]):
            for back in range(min(t + 1, taps.shape[-1])):
                near = (documents[:, t] == documents[:, t - back])[:, None, None]
                out[:, t] = out[:, t] + near * z[:, t - back] * taps[..., -1 - back]
        z = out
    return z.repeat_interleave(4 // z.shape[2], dim=2)


def recurrent_matrix(attn: Any, x: Tensor, documents: Tensor) -> Tensor:
    """[B, 4, T, T] of gdn or mamba2: a unit impulse at each token in turn, through the recurrence token by token."""
    mixer, T = attn.mixer, x.shape[1]
    q, k = (heads_of(attn, x, documents, name) for name in "qk")
    dt = F.softplus(x @ mixer.decay.weight.T + mixer.decay.bias)
    decay = (-mixer.decay.log_rate.exp() * dt).exp()  # [B, T, 4]
    delta = hasattr(mixer.update, "beta")
    if delta:
        q, k = F.normalize(q, dim=-1) / 8**0.5, F.normalize(k, dim=-1)
        write = (x @ mixer.update.beta.weight.T + mixer.update.beta.bias).sigmoid()
    else:
        write = dt
    columns = []
    for j in range(T):
        state, column = torch.zeros_like(k[:, 0]), []  # [B, 4, 8]: the impulse has one channel
        for t in range(T):
            if t:
                state = state * (documents[:, t] == documents[:, t - 1])[:, None, None]
            state = state * decay[:, t, :, None]
            value = torch.full_like(write[:, t], float(t == j))
            if delta:
                value = value - (k[:, t] * state).sum(-1) / write[:, t] * write[:, t]
            state = state + (write[:, t] * value).unsqueeze(-1) * k[:, t]
            column.append((q[:, t] * state).sum(-1))
        columns.append(torch.stack(column, dim=-1))  # [B, 4, T]
    return torch.stack(columns, dim=-1)


def normalised_matrix(attn: Any, x: Tensor, documents: Tensor, rotary: Any) -> Tensor:
    """[B, 4, T, T] of hedgehog: feature products over what is visible, rows divided by their sums."""
    shape = (*x.shape[:2], -1, 8)
    q, k = (x @ w.weight.T for w in (attn.q_proj, attn.k_proj))
    q, k = attn.family.rotate(attn, q.view(shape), k.view(shape), rotary)
    q, k = attn.mixer.map_q(q), attn.mixer.map_k(k.repeat_interleave(2, dim=2))
    place = torch.arange(x.shape[1])
    visible = (place[:, None] >= place) & (documents[:, :, None] == documents[:, None, :])
    scores = torch.einsum("bihf,bjhf->bhij", q, k) * visible[:, None]
    return scores / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", ["gdn", "mamba2", "hedgehog"])
def test_loss_and_gradients_are_those_of_matrices_built_from_impulses(
    converted: Callable[..., Any],
    pico_model: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    mixer: str,
    kind: str,
) -> None:
    batch = batch_of(kind, tmp_path, pico_tokenizer)
    model, twin = converted(mixer, LAYERS), converted(mixer, LAYERS).double()
    source = pico_model(attn_implementation="eager").double()
    mask = batch.get("attention_mask", torch.ones(4, 32))
    documents = (batch["position_ids"] == 0).cumsum(1)
    losses = {}
    for i, seen in teacher_run(source, batch).items():
        if LAYERS[i] == "L":
            attn, x = twin.model.layers[i].self_attn, seen["x"]
            rotary = seen["rotary"]
            found = (
                normalised_matrix(attn, x, documents, rotary)
                if mixer == "hedgehog"
                else recurrent_matrix(attn, x, documents)
            )
            assert found.dtype == seen["weights"].dtype == torch.float64
            norms = torch.stack(
                [
                    torch.linalg.matrix_norm(
                        (found[row, head] - seen["weights"][row, head])[mask[row].bool()], ord="fro"
                    )
                    for row in range(4)
                    for head in range(4)
                ]
            )
            losses[f"layer_{i}"] = norms.sum() / 4
    stage = make_stage("matrix_align", columns=13)
    parameters = trainable(stage, model)
    assert stage.count(batch) == 4
    measured = stage.backward(model, batch, 1 / 4)
    for name, loss in losses.items():
        assert float(measured[name]) == pytest.approx(float(loss.detach()), rel=1e-5), name
    assert float(measured["loss"]) == pytest.approx(sum(float(x.detach()) for x in losses.values()) / 2, rel=1e-5)
    (sum(losses.values()) / 4).backward()
    reached = 0
    for name, p in twin.named_parameters():
        if name not in parameters:
            assert model.get_parameter(name).grad is None
        elif p.grad is None or not p.grad.any():
            found = parameters[name].grad
            assert found is None or not found.any(), f"{name} is not part of the matrix"
        else:
            torch.testing.assert_close(parameters[name].grad.double(), p.grad, atol=1e-6, rtol=1e-3)
            reached += 1
    assert reached >= 4


@pytest.mark.parametrize("mixer", [key for key in keys("mixers") if key not in REFUSED])
@torch.no_grad()
def test_columns_in_pieces_are_the_matrix_of_the_bare_mixer(converted: Callable[..., Any], mixer: str) -> None:
    """Of every mixer that is not refused; T is neither the size of a value nor a multiple of the pieces."""
    model, T = converted(mixer).double(), 44
    attn = next(iter(swapped(model).values()))
    x = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(3)).double()
    rotary = model.model.rotary_emb(x, torch.arange(T)[None])
    call = Call(x, rotary, None, NO_BATCH)
    before, linear = attn.heads(x, rotary, NO_BATCH)[0], attn.mixer.linear_in_values
    assert not (linear and mixer in NOT_LINEAR)
    with attn.mixer.only_mixing():
        assert attn.mixer.linear_in_values
        bare = attn.heads(x, rotary, NO_BATCH)[0]
        whole = mixer_columns(attn, call)
        pieces = [mixer_columns(attn, call, slice(i, min(i + 10, T))) for i in range(0, T, 10)]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole, atol=1e-6, rtol=1e-5)
    assert not whole.triu(1).any()
    v = attn.v_proj(x).view(2, T, 2, 8).repeat_interleave(2, dim=2)
    torch.testing.assert_close(torch.einsum("bhts,bshv->bthv", whole, v), bare, atol=1e-6, rtol=1e-5)
    after = attn.heads(x, rotary, NO_BATCH)[0]
    assert torch.equal(before, after) and attn.mixer.linear_in_values == linear
    assert mixer not in NOT_LINEAR or not torch.allclose(bare, before, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_count_alike_however_they_are_batched_and_padded(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    batch, model = batch_of(kind, tmp_path, pico_tokenizer), converted("gdn", LAYERS)
    stage = make_stage("matrix_align", columns=32)
    trainable(stage, model)

    def mean(batch: dict[str, Tensor]) -> float:
        with torch.enable_grad():
            return float(stage.backward(model, batch, 1.0)["loss"]) / stage.count(batch)

    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    whole = mean(batch)
    assert sum(map(mean, rows)) / 4 == pytest.approx(whole, rel=1e-5)
    doubled = {k: torch.cat([v, v]) for k, v in batch.items()}
    assert mean(doubled) == pytest.approx(whole, rel=1e-5)
    if kind == "packed":
        return
    mask = batch.get("attention_mask", torch.ones(4, 32, dtype=torch.int64))
    lengths = mask.sum(1)
    for side in ("right", "left"):
        wide = {"input_ids": torch.ones(5, 40, dtype=torch.int64), "attention_mask": torch.zeros(5, 40).long()}
        for row, n in enumerate(lengths.tolist()):  # the fifth row is all padding
            place = slice(0, n) if side == "right" else slice(40 - n, 40)
            wide["input_ids"][row, place] = batch["input_ids"][row, :n]
            wide["attention_mask"][row, place] = 1
        wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert stage.count(wide) == 4
        assert mean(wide) == pytest.approx(whole, rel=1e-4), side


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_accumulation_and_pieces_change_nothing(
    converted: Callable[..., Any], pico_tokenizer: Any, tmp_path: Path, packing: bool
) -> None:
    data, results = dataset(tmp_path, pico_tokenizer, packing=packing), []
    for micro, columns in ((4, 32), (1, 5)):
        model = converted("gdn", LAYERS)
        stage = make_stage("matrix_align", steps=3, micro_batch_size=micro, columns=columns)
        stage.run(model, data, tmp_path / str(micro))
        results.append(metrics(tmp_path / str(micro)))
    for a, b in zip(*results, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("mixer", "settings", "trained", "factor"),
    [
        ("gdn", {}, (".mixer.",), 1.07),
        ("hedgehog", {"lr": 0.1}, (".mixer.",), 1.5),
        ("mamba2", {"train": ["*.mixer.*", "*.q_proj.*", "*.k_proj.*"]}, (".mixer.", ".q_proj.", ".k_proj."), 1.45),
    ],
)
def test_the_loss_falls_and_nothing_else_changes(
    converted: Callable[..., Any],
    pico_tokenizer: Any,
    tmp_path: Path,
    mixer: str,
    settings: dict[str, Any],
    trained: tuple[str, ...],
    factor: float,
) -> None:
    model = converted(mixer, LAYERS)
    before = snapshot(model)
    stage = make_stage("matrix_align", steps=60, **{"lr": 3e-2, **settings})
    stage.run(model, dataset(tmp_path, pico_tokenizer), tmp_path / "run")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    places = tuple(swapped(model))
    assert all(name.startswith(places) and any(part in name for part in trained) for name in changed)
    assert {part for part in trained if any(part in name for name in changed)} == set(trained)
    outside = (".output.", ".skip", ".taps.v")
    assert not [name for name in changed if name.endswith(outside) or ".output." in name]
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5]) / factor


@pytest.mark.parametrize("mixer", sorted(REFUSED))
def test_mixers_without_a_matrix_are_refused(converted: Callable[..., Any], mixer: str) -> None:
    model = converted(mixer, LAYERS)
    with pytest.raises(UserError, match="matrix_align compares mixing matrices, and \\w+ has none.*hidden_align"):
        make_stage("matrix_align").check(model)
    assert not any(attn.mixer.bare for attn in swapped(model).values())


@pytest.mark.parametrize(
    ("mixer", "settings", "message"),
    [
        ("liger", {}, "stage matrix_align has nothing to train: Liger adds no parameters"),
        ("gdn", {"train": ["lm_head.*"]}, "trains swapped layers' attention only, and pattern 'lm_head.\\*'"),
        ("gdn", {"train": ["*.mixr.*"]}, "train pattern '\\*.mixr.\\*' matches nothing that trains"),
    ],
)
def test_nothing_sensible_to_train(
    converted: Callable[..., Any], mixer: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_stage("matrix_align", **settings).check(converted(mixer, LAYERS))
