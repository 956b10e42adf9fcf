"""The short convolution: what goes to fla's kernel, and that it gives what the sum of taps does.

A stand-in convolves document by document; the kernel itself is tested on a GPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import assert_close, document_rows

from linearize.ops import conv
from linearize.ops.conv import KERNEL_TAPS, causal_conv

DOCUMENTS = [[3, 1, 8], [12]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what the stand-in convolves from here on."""
    made: list[torch.Size] = []

    def causal_conv1d(
        x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        made.append(x.shape)
        sizes = [x.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        pad, (channels, taps) = weight.shape[1] - 1, weight.shape
        filters = weight.view(channels, 1, taps)
        pieces = (F.pad(piece.mT, (pad, 0)) for piece in x.split(sizes, 1))
        return torch.cat([F.conv1d(piece, filters, groups=channels).mT for piece in pieces], 1), None

    monkeypatch.setattr(conv, "choose", lambda op, wish, x: "fla")
    monkeypatch.setattr(conv, "fla_function", lambda op, module, name: causal_conv1d)
    return made


@pytest.mark.parametrize("given", ["nothing", "mask", "documents", "both"])
def test_the_kernel_gives_what_the_sum_of_taps_does(
    given: str, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 12, 3, 5, requires_grad=True)
    weight = torch.randn(3, 5, 4, requires_grad=True)
    mask = torch.arange(12) < torch.tensor([[9], [12]]) if given in ("mask", "both") else None
    documents = document_rows(DOCUMENTS) if given in ("documents", "both") else None
    out, after = causal_conv(x, weight, mask=mask, documents=documents)
    monkeypatch.undo()
    expected, expected_after = causal_conv(x, weight, mask=mask, documents=documents, backend="torch")
    assert calls == [(2, 12, 15)] if documents is None else calls == [(1, 24, 15)]
    assert_close([out, after], [expected, expected_after], 1e-6)
    seed = torch.randn_like(out)
    grads = [torch.autograd.grad((y * seed).sum(), (x, weight), retain_graph=True) for y in (out, expected)]
    assert_close(grads[0], grads[1], 1e-6)


def test_rows_that_go_on_and_long_filters_do_not_reach_the_kernel(calls: list[torch.Size]) -> None:
    x, weight = torch.randn(2, 6, 3), torch.randn(3, 4)
    whole, _ = causal_conv(x, weight)
    first, state = causal_conv(x[:, :2], weight)
    rest, _ = causal_conv(x[:, 2:], weight, state=state)
    assert calls == [(2, 6, 3), (2, 2, 3)]
    assert_close([torch.cat([first, rest], 1)], [whole], 1e-6)
    causal_conv(x, torch.randn(3, KERNEL_TAPS + 1))
    assert len(calls) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("given", ["nothing", "mask", "documents"])
def test_flas_kernel_equals_the_sum_of_taps(given: str, dtype: torch.dtype) -> None:
    """In bfloat16 the sum of taps rounds after each, the kernel once; both are near float32."""
    T = 1000
    x = torch.randn(2, T, 8, 64, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(8, 64, 4, device="cuda", dtype=dtype).requires_grad_()
    mask = (torch.arange(T) < torch.tensor([[700], [T]])).cuda() if given == "mask" else None
    documents = document_rows([[200, 1, 99, 700], [64, 936]]).cuda() if given == "documents" else None
    out, after = causal_conv(x, weight, mask=mask, documents=documents, backend="fla")
    exact = [t.detach().float().requires_grad_() for t in (x, weight)]
    expected, expected_after = causal_conv(*exact, mask=mask, documents=documents, backend="torch")
    within = 1e-5 if dtype == torch.float32 else 1e-2
    assert out.dtype == after.dtype == dtype
    assert_close([out.float(), after.float()], [expected, expected_after], within)
    seed = torch.randn_like(expected) if mask is None else torch.randn_like(expected) * mask[..., None, None]
    grads = torch.autograd.grad((out * seed.to(dtype)).sum(), (x, weight))
    truths = torch.autograd.grad((expected * seed.to(dtype).float()).sum(), exact)
    assert_close([g.float() for g in grads], truths, within)
