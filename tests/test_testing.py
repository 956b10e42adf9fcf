"""`check_mixer` passes for every shipped mixer, and names the rule that a broken one breaks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pico import small_mixer
from torch import nn

from linearize.inits.base import Constant, Init
from linearize.mixers.base import HeadShape, Mixer
from linearize.registry import keys
from linearize.testing import check_mixer


@dataclass(frozen=True)
class PlainConfig:
    """No settings."""


class Plain(Mixer):
    """Exponential averages of values and a gate: the shortest mixer that keeps the contract, to be broken below."""

    Config = PlainConfig

    def __init__(self, config: Any, shape: HeadShape):
        super().__init__(config, shape)
        self.gate = nn.Parameter(torch.empty(shape.heads))

    def inits(self) -> dict[str, Init]:
        return {"gate": Constant(0.0)}

    def expand(self, v: torch.Tensor) -> torch.Tensor:
        return v.repeat_interleave(self.shape.heads // v.shape[2], dim=2)

    def write(self, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.expand(v) * q.mean(-1, keepdim=True).sigmoid()

    def forward(self, q, k, v, x, ctx, state=None):
        values = self.write(q, v)
        S = values.new_zeros(values[:, 0].shape) if state is None else state["mean"]
        outs = []
        for t in range(values.shape[1]):
            if ctx.documents is not None and t > 0:
                S = S * (ctx.documents[:, t] == ctx.documents[:, t - 1])[:, None, None]
            new = 0.9 * S + values[:, t]
            S = new if ctx.mask is None else torch.where(ctx.mask[:, t, None, None], new, S)
            outs.append(S * self.gate[:, None].to(v.dtype))
        return torch.stack(outs, dim=1), {"mean": S}


class LeaksTheFuture(Plain):
    def write(self, q, v):
        values = super().write(q, v)
        return values + 0.01 * values.mean(1, keepdim=True)


class LeaksItsGradient(Plain):
    """The value does not move, so that only the gradient tells."""

    def write(self, q, v):
        values = super().write(q, v)
        ahead = values.roll(-1, dims=1)
        return values + 0.1 * (ahead - ahead.detach())


class IgnoresPadding(Plain):
    def forward(self, q, k, v, x, ctx, state=None):
        return super().forward(q, k, v, x, without(ctx, "mask"), state)


class IgnoresDocuments(Plain):
    def forward(self, q, k, v, x, ctx, state=None):
        return super().forward(q, k, v, x, without(ctx, "documents"), state)


class StateGrows(Plain):
    def forward(self, q, k, v, x, ctx, state=None):
        y, after = super().forward(q, k, v, x, ctx, state)
        return y, {**after, "seen": v if state is None else torch.cat([state["seen"], v], dim=1)}


class DecodesDifferently(Plain):
    def forward(self, q, k, v, x, ctx, state=None):
        y, after = super().forward(q, k, v, x, ctx, state)
        return (y * 1.001 if q.shape[1] == 1 and state is not None else y), after


class TilesHeads(Plain):
    def expand(self, v):
        return v.repeat(1, 1, self.shape.heads // v.shape[2], 1)


class DropsOut(Plain):
    def write(self, q, v):
        return nn.functional.dropout(super().write(q, v), 0.1, self.training)


class MixesRows(Plain):
    def write(self, q, v):
        values = super().write(q, v)
        return values - values.mean(0, keepdim=True) / 10


class ForgetsAnInit(Plain):
    def inits(self):
        return {}


class DrawsInits(Plain):
    def initialise(self, name, seed):
        nn.init.normal_(self.gate)


class ChangesItsState(Plain):
    def forward(self, q, k, v, x, ctx, state=None):
        y, after = super().forward(q, k, v, x, ctx, state)
        if state is not None:
            state["mean"].copy_(after["mean"])
        return y, after


class KeepsAListOfInts(Plain):
    def forward(self, q, k, v, x, ctx, state=None):
        y, after = super().forward(q, k, v, x, ctx, state)
        return y, {**after, "count": q.shape[1]}


class ReturnsFloat32(Plain):
    def forward(self, q, k, v, x, ctx, state=None):
        y, after = super().forward(q, k, v, x, ctx, state)
        return y.float(), after


class HidesAWeight(Plain):
    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.hidden = torch.randn(1).double().exp()

    def write(self, q, v):
        return super().write(q, v) * self.hidden.to(v.dtype)


class SquaresValues(Plain):
    def write(self, q, v):
        return super().write(q, v).square()


class NamesABranch(Plain):
    branches = ("linear",)


class ReadsNumbers(Plain):
    def write(self, q, v):
        return super().write(q, v) * (1.0 if float(q.sum()) else 2.0)


class MixesDtypes(Plain):
    def write(self, q, v):
        return (super().write(q, v).transpose(2, 3) @ self.gate.diag()).transpose(2, 3)


def without(ctx: Any, name: str) -> Any:
    return type(ctx)(**{**vars(ctx), name: None})


NUMBER = r"[\d.e+-]+"
BROKEN = {
    LeaksTheFuture: rf"No output depends on later tokens\. .*before token 1 .*differs by {NUMBER} of",
    LeaksItsGradient: rf"No output depends on later tokens\. output 0 has gradient {NUMBER} for [qv] of later tokens",
    IgnoresPadding: r"Padding .* changes neither .*63 tokens padded to 80",
    IgnoresDocuments: r"Packed documents .* tokens 20 to 21",
    StateGrows: r"The state has the same size.* bytes after 1, \d+ bytes after 80",
    DecodesDifferently: r"Tokens in pieces.* tokens one by one against all at once: differs by 0\.001 of",
    TilesHeads: r"Query head h reads key head.* not tiled",
    DropsOut: r"train\(\) and eval\(\)",
    MixesRows: r"A row does not depend on the other rows.* row 0 of 3",
    ForgetsAnInit: r"inits\(\) names every parameter.* gate",
    DrawsInits: r"gate depends on the global random state",
    ChangesItsState: r"A call changes neither.* a call on 1 tokens changed the state",
    KeepsAListOfInts: r"the state holds a int",
    ReturnsFloat32: r"y is torch\.float32, v is torch\.float64",
    HidesAWeight: r"state_dict\(\) holds all there is",
    SquaresValues: r"y is linear in v where",
    NamesABranch: r"'linear' switched off changes nothing",
}


@pytest.mark.parametrize("key", keys("mixers"))
def test_every_shipped_mixer_keeps_every_rule(key: str) -> None:
    check_mixer(key, {name: value for name, value in small_mixer(key).items() if name != "type"})


def test_the_mixer_that_is_broken_below_keeps_every_rule() -> None:
    check_mixer(Plain)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_rule_is_named(broken: type[Mixer]) -> None:
    with pytest.raises(AssertionError) as caught:
        check_mixer(broken)
    assert str(caught.value).startswith(f"{__name__}:{broken.__name__} breaks a rule: ")
    assert re.search(BROKEN[broken], str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (ReadsNumbers, "It runs on tensors without data, as `linearize plan` does"),
        (MixesDtypes, "Weights in float32, which stages train, serve heads and layer inputs in bfloat16"),
    ],
)
def test_an_exception_of_the_mixer_says_what_was_being_checked(broken: type[Mixer], rule: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        check_mixer(broken)
    assert caught.value.__notes__ == [f"while checking {__name__}:{broken.__name__}: {rule}"]


def test_settings_are_checked_as_in_a_recipe() -> None:
    with pytest.raises(ValueError, match="unknown key 'windw'; did you mean 'window'"):
        check_mixer("lolcats", {"windw": 8})
