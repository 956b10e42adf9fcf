"""The choice of backend: explicit wishes are met or refused, auto falls back once and says so, CPU stays
clean.
"""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from op_cases import CASES, Case

from linearize.ops import backend

CPU = torch.zeros(1)


def test_explicit_choices_on_cpu():
    assert backend.choose("gla", "torch", CPU) == "torch"
    assert backend.choose("gla", "naive", CPU) == "naive"
    assert backend.choose("gla", "auto", CPU) == "torch"


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown backend 'trition' for gla; known: auto, torch"):
        backend.choose("gla", "trition", CPU)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fla_on_cpu_is_refused_also_for_a_step(case: Case):
    inputs = case.inputs(1, 3)
    _, state = case.run(inputs)
    for T, given in ((3, None), (1, state)):
        with pytest.raises(ValueError, match=r"'fla' cannot be used: .* is on cpu; use backend 'auto'"):
            case.run([x[:, :T] for x in inputs], state=given, backend="fla")


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture):
    backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="linearize.ops.backend"):
        for _ in range(3):
            backend.choose("some_operator", "auto", CPU)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and messages[0].startswith("some_operator: backend auto -> torch (")


class _OnCuda:
    """What `choose` reads of a CUDA tensor."""

    is_cuda, dtype, device, requires_grad = True, torch.bfloat16, torch.device("cuda"), False
    shape = (2, 3, 4, 5)


def test_on_cuda_the_reason_decides(monkeypatch: pytest.MonkeyPatch):
    tensor: torch.Tensor = _OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(backend, "_missing_packages", lambda: "")
    assert backend.choose("gla", "auto", tensor) == backend.choose("gla", "fla", tensor) == "fla"
    assert backend.choose("gla", "auto", tensor, "no such kernel") == "torch"
    with pytest.raises(ValueError, match="no such kernel"):
        backend.choose("gla", "fla", tensor, "no such kernel")
    monkeypatch.setattr(backend, "_missing_packages", lambda: "triton")
    assert backend.choose("gla", "auto", tensor) == "torch"
    with pytest.raises(ValueError, match="triton not installed"):
        backend.choose("gla", "fla", tensor)


@pytest.mark.parametrize(
    ("capability", "triton", "broken"),
    [
        (9, "3.6.0", True),
        (9, "3.7.0+git1", True),
        (9, "3.7.1", False),
        (9, "3.3.1", False),
        (8, "3.6.0", False),
    ],
)
def test_scalar_gates_avoid_the_miscompiled_backward(
    monkeypatch: pytest.MonkeyPatch, capability: int, triton: str, broken: bool
):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    backend._broken_gate_backward.cache_clear()
    training, inference = _OnCuda(), _OnCuda()
    training.requires_grad = True
    gate = torch.zeros(2, 3, 4)
    assert backend.kernel_gate(gate, training).dim() == (4 if broken else 3)
    assert backend.kernel_gate(gate, inference) is gate
    with torch.no_grad():
        assert backend.kernel_gate(gate, training) is gate
    backend._broken_gate_backward.cache_clear()


def test_cpu_use_imports_neither_triton_nor_fla():
    code = """
import sys, torch
from linearize.ops import gla, linear, simple_gla, window
x = torch.rand(1, 5, 2, 4)
linear.linear_attention(x, x, x)
simple_gla.simple_gla(x, x, x, -x[..., 0])
gla.gla(x, x, x, -x)
window.window_attention(x, x, x, window=2, scale=1.0)
loaded = [name for name in sys.modules if name.split(".")[0] in ("triton", "fla", "pydantic")]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
