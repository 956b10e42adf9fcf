"""What fla's kernels are called with: which kernel, which gate, which dtypes.

Stand-ins compute the recurrences token by token; the kernels themselves are tested on a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import CASES, Case, as_leaves, assert_close, gradients

from linearize.ops import backend, delta, recurrence, simple_gla
from linearize.ops.delta import DELTA_RULE
from linearize.ops.gla import GLA
from linearize.ops.simple_gla import SIMPLE_GLA

KERNELS = {
    "chunk_simple_gla": (SIMPLE_GLA, 3),
    "chunk_gla": (GLA, 4),
    "chunk_delta_rule": (DELTA_RULE, 0),
    "chunk_gated_delta_rule": (DELTA_RULE, 3),
    "chunk_kda": (DELTA_RULE, 4),
}
"""The kernel's recurrence, and the dimensions of its decay."""
STAND_INS = [
    c for c in CASES if c.recurrence.kernel is not None and c.name not in ("dplr", "gsa", "linear_vector", "gla")
]
PER_HEAD = [c for c in STAND_INS if c.decay == "head"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[torch.dtype, ...]]]:
    """Kernel and dtypes of q, k and v of each call that is made from here on."""
    made: list[tuple[str, tuple[torch.dtype, ...]]] = []

    def kernel(op: str, folder: str, name: str) -> Callable[..., Any]:
        form, dimensions = KERNELS[name]

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor, **options: Any) -> Any:
            made.append((name, (q.dtype, k.dtype, v.dtype)))
            if "g" in options:
                gates = (options["g"],)
            if name == "chunk_delta_rule":
                gates = (None, *gates)  # type: ignore[assignment]
            assert gates[0] is None or gates[0].dim() == dimensions
            out, state = form.naive(q.float() * options["scale"], k.float(), v.float(), *gates, state=None)
            return out.to(v.dtype), state

        return call

    monkeypatch.setattr(recurrence, "choose", lambda *given: "fla")
    for module in (delta, simple_gla):
        monkeypatch.setattr(module, "fla_kernel", kernel)
    return made


@pytest.mark.parametrize("case", PER_HEAD, ids=lambda case: case.name)
def test_a_decay_per_head_trains_as_equal_decays_per_channel_where_its_own_gradients_are_wrong(
    case: Case, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = as_leaves(case.inputs(2, 12), torch.float32)
    seen = {}
    for broken in (False, True):
        monkeypatch.setattr(backend, "_broken_gate_backward", lambda broken=broken: broken)
        outputs, _ = case.run(inputs)
        seen[broken] = [*outputs, *gradients(outputs, inputs)]
        with torch.no_grad():
            assert_close(case.run(inputs)[0], outputs, 1e-6)
    own, channels = (
        ("chunk_simple_gla", "chunk_gla") if "delta" not in case.name else ("chunk_gated_delta_rule", "chunk_kda")
    )
    assert [name for name, _ in calls] == [own, own, channels, own]
    assert_close(seen[True], seen[False], 1e-5)


@pytest.mark.parametrize("case", STAND_INS, ids=lambda case: case.name)
def test_unit_keys_take_the_dtype_of_the_values_and_others_the_common_one(case: Case, calls: list[Any]) -> None:
    """As in mixed precision, where feature maps give float32 beside bfloat16 values."""
    inputs = case.inputs(2, 12)
    inputs[2] = inputs[2].bfloat16()
    with torch.no_grad():
        case.run(inputs)
    expected = torch.bfloat16 if case.recurrence.unit_keys else torch.float32
    assert calls and all(dtypes == (expected,) * 3 for _, dtypes in calls)
    assert calls[0][0] == "chunk_delta_rule" or case.name != "delta"
