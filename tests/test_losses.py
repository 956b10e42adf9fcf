"""Every loss against its formula, written out in float64, with and without a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linearize.losses import cosine, mse, next_token, weight_cross_entropy

KEEP = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape), torch.randn(shape)


def kept(per_token: torch.Tensor, keep: torch.Tensor | None) -> float:
    """Sum of [B, T] over real tokens, one by one."""
    return sum(float(per_token[b, t]) for b in range(2) for t in range(5) if keep is None or bool(keep[b, t]))


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 3, 4)], ids=["output", "heads"])
def test_mse(shape: tuple[int, ...], keep: torch.Tensor | None) -> None:
    student, teacher = pair(*shape)
    error = ((student.double() - teacher.double()) ** 2).reshape(2, 5, -1)
    error = error.sum(-1) / error.shape[-1]
    assert float(mse(student, teacher, keep)) == pytest.approx(kept(error, keep), rel=1e-6)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 3, 4)], ids=["output", "heads"])
def test_cosine(shape: tuple[int, ...], keep: torch.Tensor | None) -> None:
    student, teacher = (x.double() for x in pair(*shape))
    angle = (student * teacher).sum(-1) / (student.square().sum(-1) * teacher.square().sum(-1)).sqrt()
    distance = (1 - angle).reshape(2, 5, -1).mean(-1)
    found = cosine(student.float(), teacher.float(), keep)
    assert float(found) == pytest.approx(kept(distance, keep), rel=1e-5)
    assert float(cosine(teacher.float(), 3 * teacher.float(), keep)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "masked"])
def test_weight_cross_entropy(keep: torch.Tensor | None) -> None:
    causal = torch.ones(5, 5).tril().bool()
    student, teacher = (x.masked_fill(~causal, float("-inf")).softmax(-1) for x in pair(2, 3, 5, 5))
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in range(5)):
        expected[b, i] -= (teacher[b, h, i, : i + 1].double() * student[b, h, i, : i + 1].double().log()).sum() / 3
    found = weight_cross_entropy(student, teacher, keep)
    assert float(found) == pytest.approx(kept(expected, keep), rel=1e-5)
    assert float(weight_cross_entropy(teacher, teacher, keep)) < float(found)


def test_next_token_is_the_loss_of_transformers_times_the_labels(pico_model: Any) -> None:
    torch.manual_seed(0)
    model, ids = pico_model(), torch.randint(2, 97, (2, 12))
    labels = ids.clone()
    labels[0, :6], labels[1, 9:] = -100, -100
    logits = model(ids).logits.detach()
    count = int((labels[:, 1:] != -100).sum())
    expected = -sum(
        float(logits[b, t].double().log_softmax(-1)[labels[b, t + 1]])
        for b in range(2)
        for t in range(11)
        if labels[b, t + 1] != -100
    )
    asked = labels[:, 1:] != -100
    assert float(next_token(logits[:, :-1][asked], labels[:, 1:][asked])) == pytest.approx(expected, rel=1e-6)
    assert float(model(ids, labels=labels).loss.detach()) * count == pytest.approx(expected, rel=1e-6)


def test_bfloat16_is_compared_in_float32() -> None:
    student, teacher = (x.bfloat16() for x in pair(2, 5, 3, 4))
    for loss in (mse, cosine):
        found = loss(student, teacher, None)
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(loss(student.float(), teacher.float(), None)))
