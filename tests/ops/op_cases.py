"""Inputs and calls that the tests of the recurrences share: one `Case` per operator, all behind the same
call.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from linearize.ops.delta import DELTA_RULE, delta_rule
from linearize.ops.delta_product import DELTA_PRODUCT, delta_product
from linearize.ops.dplr import DPLR, dplr
from linearize.ops.gla import GLA, gla
from linearize.ops.gsa import GSA, gsa
from linearize.ops.linear import LINEAR, linear_attention
from linearize.ops.log_linear import LOG_LINEAR, log_linear
from linearize.ops.mlstm import MLSTM, mlstm
from linearize.ops.recurrence import Recurrence
from linearize.ops.simple_gla import SIMPLE_GLA, simple_gla
from linearize.ops.ttt import TTT, ttt_linear

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An operator: `inputs` makes q, k, v and gates, `run` gives (outputs, state), both as lists of tensors."""

    name: str
    op: Callable
    recurrence: Recurrence
    decay: str = "none"
    """What the first gate is: no gate at all, a log-decay per head, or per channel."""
    prepare: Callable[[Tensors], Tensors] = list
    """Puts random q, k and v into the range that the recurrence is meant for."""
    gates: Callable[[int, int, int, int], Tensors] = lambda B, T, H, K: []
    """(B, T, H, K) -> the gates after the decay."""
    options: dict = field(default_factory=dict)
    """Passed to the operator always."""
    tolerance: float = 1e-5
    """Largest relative error of float32 against float64; gradients get ten times as much."""

    def inputs(self, B: int, T: int, H: int = 2, K: int = 8, V: int = 6, *, groups: int = 1, seed: int = 0) -> Tensors:
        torch.manual_seed(seed)
        qkv = self.prepare([torch.randn(B, T, H * groups, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)])
        decay = [] if self.decay == "none" else [self.log_decay(B, T, H, K, -0.2)]
        return [*qkv, *decay, *self.gates(B, T, H, K)]

    def log_decay(self, B: int, T: int, H: int, K: int, strongest: float) -> torch.Tensor:
        """Mostly weak decays, one in ten as strong as `strongest`."""
        shape = (B, T, H) if self.decay == "head" else (B, T, H, K)
        weak = -0.1 * torch.rand(shape)
        return torch.where(torch.rand(shape) < 0.1, strongest, weak)

    def with_decay(self, inputs: Tensors) -> list[torch.Tensor | None]:
        """The inputs as the forms take them: None for the decay of an operator that has none."""
        return [*inputs[:3], None, *inputs[3:]] if self.decay == "none" else list(inputs)

    def run(self, inputs: Tensors, **options) -> tuple[Tensors, Tensors]:
        if options.get("state") is not None:
            options["state"] = options["state"][0] if len(options["state"]) == 1 else tuple(options["state"])
        *outputs, state = self.op(*inputs, **self.options, **options)
        return outputs, list(state) if isinstance(state, tuple) else [state]


def _softmaxed(qkv: Tensors) -> Tensors:
    return [qkv[0].softmax(-1), qkv[1].softmax(-1), qkv[2]]


def _unit_keys(qkv: Tensors) -> Tensors:
    return [qkv[0], torch.nn.functional.normalize(qkv[1], dim=-1), qkv[2]]


def _two_steps(qkv: Tensors) -> Tensors:
    """k and v with two steps for each token."""
    k, v = (torch.randn(*x.shape[:3], 2, x.shape[3]) for x in qkv[1:])
    return _unit_keys([qkv[0], k, v])


def _undecayed_delta(q, k, v, beta, **options):
    return delta_rule(q, k, v, None, beta, **options)


def _rwkv7_low_rank(B: int, T: int, H: int, K: int) -> Tensors:
    """a = -kappa of unit norm and b = kappa * rate, so that no state grows."""
    kappa = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
    return [-kappa, kappa * torch.rand(B, T, H, K)]


def _six_levels(B: int, T: int, H: int, K: int) -> Tensors:
    """Weights of six Fenwick levels, so that the last one takes what lies outside an aligned block of 16 tokens."""
    return [torch.rand(B, T, H, 6)]


def _square_unit_keys(qkv: Tensors) -> Tensors:
    """Values of as many channels as keys."""
    return _unit_keys([*qkv[:2], torch.randn_like(qkv[1])])


def _ttt_rates(B: int, T: int, H: int, K: int) -> Tensors:
    return [torch.rand(B, T, H) / K, 0.5 + torch.rand(B, T, H)]


def _ttt(q, k, v, eta, gain, **options):
    """TTT with one inner model for all heads, made without random numbers."""
    H, K = k.shape[2:]
    channel = torch.arange(K, device=k.device)
    w0 = torch.sin(1.0 + channel + K * channel[:, None])
    parts = (1 + 0.2 * torch.sin(channel), 0.2 * torch.cos(channel), w0, 0.1 * torch.sin(3.0 * channel))
    return ttt_linear(q, k, v, eta, *(x.expand(H, *x.shape) for x in parts), gain, **options)


CASES = [
    Case("linear", linear_attention, LINEAR, prepare=_softmaxed),
    Case("linear_scalar", linear_attention, LINEAR, "head", _softmaxed),
    Case("linear_vector", linear_attention, LINEAR, "channel", _softmaxed),
    Case("simple_gla", simple_gla, SIMPLE_GLA, "head"),
    Case("gla", gla, GLA, "channel"),
    Case("delta", _undecayed_delta, DELTA_RULE, "none", _unit_keys, lambda B, T, H, K: [2 * torch.rand(B, T, H)]),
    Case("gated_delta", delta_rule, DELTA_RULE, "head", _unit_keys, lambda B, T, H, K: [torch.rand(B, T, H)]),
    Case("kda", delta_rule, DELTA_RULE, "channel", _unit_keys, lambda B, T, H, K: [torch.rand(B, T, H)]),
    Case(
        "delta_product", delta_product, DELTA_PRODUCT, "head", _two_steps, lambda B, T, H, K: [torch.rand(B, T, H, 2)]
    ),
    Case("dplr", dplr, DPLR, "channel", gates=_rwkv7_low_rank),
    Case("gsa", gsa, GSA, "channel", gates=lambda B, T, H, K: [torch.rand(B, T, H, K)]),
    # positive q and k: a denominator of either sign can vanish and then magnifies every rounding
    Case("mlstm", mlstm, MLSTM, "head", _softmaxed, lambda B, T, H, K: [2 * torch.randn(B, T, H)]),
    Case("log_linear", log_linear, LOG_LINEAR, "head", gates=_six_levels),
    Case(
        "log_linear_delta",
        log_linear,
        LOG_LINEAR,
        "head",
        _unit_keys,
        lambda B, T, H, K: [*_six_levels(B, T, H, K), torch.rand(B, T, H)],
    ),
    Case("ttt", _ttt, TTT, "none", _square_unit_keys, _ttt_rates, {"batch_tokens": 10}),
]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def fla_reference(op: str, name: str):
    """A reference function of the installed fla, loaded by path: importing the fla package needs triton."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "ops" / op / "naive.py"
    reference = importlib.util.spec_from_file_location(f"fla_{op}_naive", path)
    assert reference is not None and reference.loader is not None
    module = importlib.util.module_from_spec(reference)
    reference.loader.exec_module(module)
    return getattr(module, name)


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the truth (a truth of zeros asks for exact zeros)."""
    assert x.shape == truth.shape
    difference = (x.double() - truth.double()).abs().max().item()
    return difference / max(truth.double().abs().max().item(), 1e-300) if difference else difference


def assert_close(results: Tensors, truths: Tensors, tolerance: float) -> None:
    assert len(results) == len(truths)
    errors = [relative_error(x, y) for x, y in zip(results, truths, strict=True)]
    assert all(error <= tolerance for error in errors), errors


def gradients(outputs: Tensors, inputs: Tensors) -> Tensors:
    """Gradients of a fixed random functional of the outputs."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x.cpu().double() * weight).sum()
    return list(torch.autograd.grad(loss, [x for x in inputs if x.is_floating_point()]))


def as_leaves(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """Copies that collect gradients; counts stay as they are."""
    return [x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs]


def right_padding(lengths: list[int], T: int) -> torch.Tensor:
    return torch.arange(T)[None, :] < torch.tensor(lengths)[:, None]


def document_rows(rows: list[list[int]]) -> torch.Tensor:
    """`[B, T]` document numbers from the lengths of each row's documents."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def random_splits(T: int, seed: int) -> list[int]:
    """Lengths >= 1 that sum to T."""
    cuts = torch.randperm(T - 1, generator=torch.Generator().manual_seed(seed))[:4] + 1
    borders = [0, *sorted(cuts.tolist()), T]
    return [b - a for a, b in pairwise(borders)]
