"""The rules of the mixer contract, one function each; its docstring is the rule.

Each takes `make(kv_heads=2, *, filled=True)`, which gives the same small mixer on every call, in float64, or with
`filled=False` one whose parameters hold nothing yet. It raises AssertionError with the numbers that break it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import torch
from safetensors.torch import load, save
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from linearize.fake_run import state_bytes
from linearize.mixers.base import Mixer, branch_off
from linearize.testing.calls import HEADS, KV_HEADS, Tensors, expand_rows, inputs, nbytes, run, run_pieces

LENGTH = 80
"""Tokens of a checked row: more than the default windows and chunks of 64."""
TOLERANCE = 1e-5
"""Largest difference over the largest value: wide for float64, so that a mixer may compute in float32."""


Make = Callable[..., Mixer]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _same(result: torch.Tensor, truth: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Raises AssertionError unless the largest difference is at most `tolerance` of the largest value."""
    _check(result.shape == truth.shape, f"{what}: shape {list(result.shape)} instead of {list(truth.shape)}")
    largest = max(float(truth.abs().max()), 1e-30)
    difference = float((result - truth).abs().max()) / largest
    _check(difference <= tolerance, f"{what}: differs by {difference:.2g} of the largest value, {tolerance:g} allowed")


def _given(B: int, T: int = LENGTH, seed: int = 0) -> Tensors:
    return inputs(B, T, seed=seed, dtype=torch.float64)


def _rows(given: Tensors, row: int, tokens: slice = slice(None)) -> Tensors:
    return [x[row : row + 1, tokens] for x in given]


def every_parameter_has_an_init(make: Make) -> None:
    """inits() names every parameter, and initialise() fills each from its name and seed alone."""
    values = []
    for seed in range(2):
        mixer = make(filled=False)
        named = {name for name, _ in mixer.named_parameters()}
        wrong = sorted(named ^ set(mixer.inits()))
        _check(not wrong, f"these are a parameter or an init, not both: {', '.join(wrong)}")
        for parameter in mixer.parameters():
            parameter.data.fill_(float("nan"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixer.initialise("model.layers.7.self_attn.mixer", seed=3)
        values.append(dict(mixer.named_parameters()))
    for name, value in values[0].items():
        _check(bool(value.isfinite().all()), f"{name} is not finite")
        _check(torch.equal(value, values[1][name]), f"{name} depends on the global random state")


@torch.no_grad()
def shapes_are_right(make: Make) -> None:
    """y is [B, T, Hq, V] in the dtype of v, and the state is tensors with the batch first."""
    for T in (1, LENGTH):
        for dtype in (torch.float64, torch.bfloat16):
            mixer = make().to(dtype)
            y, state = run(mixer, inputs(3, T, dtype=dtype))
            expected = [3, T, HEADS, mixer.shape.value_dim]
            _check(list(y.shape) == expected, f"y is {list(y.shape)}, expected {expected}")
            _check(y.dtype == dtype, f"y is {y.dtype}, v is {dtype}")
            _check(bool(y.isfinite().all()), f"y in {dtype} is not finite")
            for leaf in tree_leaves(state):
                _check(isinstance(leaf, torch.Tensor), f"the state holds a {type(leaf).__name__}")
                _check(leaf.shape[:1] == (3,), f"the state of 3 rows holds a tensor of shape {list(leaf.shape)}")


@torch.no_grad()
def training_weights_serve_the_model_dtype(make: Make) -> None:
    """Weights in float32, which stages train, serve heads and layer inputs in bfloat16."""
    y, _ = run(make().float(), inputs(1, LENGTH, dtype=torch.bfloat16))
    _check(y.dtype == torch.bfloat16, f"y is {y.dtype}, v is {torch.bfloat16}")


def a_plan_needs_no_data(make: Make) -> None:
    """It runs on tensors without data, as `linearize plan` does."""
    with FakeTensorMode():
        mixer = make(filled=False)
        state_bytes(mixer, mixer.shape, torch.float32)


def nothing_depends_on_later_tokens(make: Make) -> None:
    """No output depends on later tokens."""
    mixer = make()
    for changed in (1, 16, LENGTH - 1):
        leaves = [x.requires_grad_() for x in _given(1)]
        y, _ = run(mixer, leaves)
        others = [x.detach().clone() for x in leaves]
        for x in others:
            x[:, changed:] = x[:, changed:].flip(1) + 1.0
        with torch.no_grad():
            moved, _ = run(mixer, others)
        _same(
            moved[:, :changed], y[:, :changed].detach(), f"outputs before token {changed} when it and later ones change"
        )
        found = torch.autograd.grad(y[:, changed - 1].sum(), leaves, allow_unused=True, materialize_grads=True)
        for name, grad in zip(("q", "k", "v", "x"), found, strict=True):
            ahead, behind = float(grad[:, changed:].abs().max()), float(grad[:, :changed].abs().max())
            _check(
                ahead <= TOLERANCE * behind,
                f"output {changed - 1} has gradient {ahead:.2g} for {name} of later tokens, {behind:.2g} of earlier",
            )


@torch.no_grad()
def the_state_does_not_grow(make: Make) -> None:
    """The state has the same size at every length."""
    sizes = {T: nbytes(run(make(), _given(1, T))[1]) for T in (1, LENGTH, 2 * LENGTH)}
    shown = ", ".join(f"{size} bytes after {T}" for T, size in sizes.items())
    _check(len(set(sizes.values())) == 1, f"Tokens: {shown}")


@torch.no_grad()
def training_mode_changes_nothing(make: Make) -> None:
    """Outputs are the same in train() and eval()."""
    mixer = make()
    (trained, _), (evaluated, _) = (run(mixer.train(mode), _given(1)) for mode in (True, False))
    _same(trained, evaluated, "train() against eval()")


@torch.no_grad()
def pieces_equal_the_whole(make: Make) -> None:
    """Tokens in pieces, each with the state of the last, give what they give at once."""
    mixer, given = make(), _given(2)
    whole, _ = run(mixer, given)
    cases = {
        "one by one": [1] * LENGTH,
        "13, 1 and the rest": [13, 1, LENGTH - 14],
        "70, then one by one": [70, *[1] * 10],
    }
    for name, lengths in cases.items():
        _same(run_pieces(mixer, given, lengths)[0], whole, f"tokens {name} against all at once")


@torch.no_grad()
def rows_are_independent(make: Make) -> None:
    """A row does not depend on the other rows of its batch, nor does its state."""
    mixer, given, more = make(), _given(3), _given(3, 2, seed=3)
    together, state = run(mixer, given)
    following, _ = run(mixer, more, state, start=LENGTH)
    for row in range(3):
        alone, alone_state = run(mixer, _rows(given, row))
        after, _ = run(mixer, _rows(more, row), alone_state, start=LENGTH)
        _same(together[row : row + 1], alone, f"row {row} of 3 against the row alone")
        _same(following[row : row + 1], after, f"tokens after row {row} of 3 against those after the row alone")


@torch.no_grad()
def padding_is_not_seen(make: Make) -> None:
    """Padding (ctx.mask) changes neither the outputs of real tokens nor the state."""
    lengths = [LENGTH, 63, 1]
    mixer, given, more = make(), _given(3), _given(3, 3, seed=3)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    for x in given:
        x[~mask] *= 100.0
    y, state = run(mixer, given, mask=mask)
    following, _ = run(mixer, more, state, positions=torch.tensor(lengths)[:, None] + torch.arange(3))
    for row, n in enumerate(lengths):
        alone, alone_state = run(mixer, _rows(given, row, slice(n)))
        after, _ = run(mixer, _rows(more, row), alone_state, start=n)
        _same(y[row : row + 1, :n], alone, f"{n} tokens padded to {LENGTH} against the same without padding")
        _same(following[row : row + 1], after, f"tokens after {n} tokens padded to {LENGTH}")
    step = _given(2, 1, seed=1)
    _, before = run(mixer, _given(2, 30))
    _, after_step = run(mixer, step, before, start=30, mask=torch.tensor([[True], [False]]))
    following, _ = run(
        mixer, more := _given(2, 3, seed=2), after_step, positions=torch.tensor([[31], [30]]) + torch.arange(3)
    )
    expected, _ = run(mixer, more, before, start=30)
    _same(following[1:], expected[1:], "tokens after a padded step")


@torch.no_grad()
def documents_are_independent(make: Make) -> None:
    """Packed documents (ctx.documents) give what each gives alone."""
    lengths = [20, 1, 43, 16]
    mixer, given, more = make(), _given(1), _given(1, 3, seed=3)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    y, state = run(mixer, given, positions=positions, documents=numbers)
    for start, end in pairwise([0, 20, 21, 64, 80]):
        alone, alone_state = run(mixer, _rows(given, 0, slice(start, end)))
        _same(y[:, start:end], alone, f"tokens {start} to {end} as a packed document against the document alone")
    after, _ = run(mixer, more, alone_state, start=16)
    _same(run(mixer, more, state, start=16)[0], after, "tokens after the last packed document")


@torch.no_grad()
def grouped_heads_are_repeated_in_place(make: Make) -> None:
    """Query head h reads key head h // (Hq // Hkv): key heads are repeated in place, not tiled."""
    groups = HEADS // KV_HEADS
    grouped, expanded = make(), make(kv_heads=HEADS)
    wanted = expanded.state_dict()
    expanded.load_state_dict({name: expand_rows(x, wanted[name], groups) for name, x in grouped.state_dict().items()})
    q, k, v, x = _given(2)
    wide = [t.repeat_interleave(groups, dim=2) for t in (k, v)]
    _same(run(grouped, [q, k, v, x])[0], run(expanded, [q, *wide, x])[0], "2 key heads against each of them twice")


@torch.no_grad()
def saving_keeps_everything(make: Make) -> None:
    """state_dict() holds all there is: a saved mixer reloads to the same outputs."""
    mixer, other = make(), make()
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    other.load_state_dict(load(save(mixer.state_dict())))
    _same(run(other, _given(1))[0], run(mixer, _given(1))[0], "the reloaded mixer", tolerance=0.0)


@torch.no_grad()
def nothing_changes_in_place(make: Make) -> None:
    """A call changes neither its inputs nor the state it got."""
    mixer, given = make(), _given(1)
    _, state = run(mixer, given)
    before = [x.clone() for x in tree_leaves(state)]
    for T in (1, 30):
        more = _given(1, T, seed=1)
        run(mixer, more, state, start=LENGTH)
        _check(all(map(torch.equal, more, _given(1, T, seed=1))), f"a call on {T} tokens changed its inputs")
        _check(all(map(torch.equal, tree_leaves(state), before)), f"a call on {T} tokens changed the state it got")


@torch.no_grad()
def branches_can_be_switched_off(make: Make) -> None:
    """Each branch that `branches` names can be switched off."""
    mixer, given = make(), _given(1)
    whole, _ = run(mixer, given)
    for branch in mixer.branches:
        with branch_off(mixer, branch):
            without, _ = run(mixer, given)
        _check(bool(without.isfinite().all()), f"without {branch!r} y is not finite")
        _check(not torch.equal(without, whole), f"{branch!r} switched off changes nothing; honour self.disabled")


@torch.no_grad()
def declared_linearity_is_true(make: Make) -> None:
    """y is linear in v where `linear_in_values` says so, `bare` or not, and affine in `output_scale` where there is
    one.
    """
    mixer, (q, k, v, x), other = make(), _given(1), _given(1, seed=5)[2]
    for context in (nullcontext(), mixer.only_mixing()):
        with context:
            if mixer.linear_in_values:
                total = run(mixer, [q, k, v, x])[0] + 2 * run(mixer, [q, k, other, x])[0]
                both = run(mixer, [q, k, v + 2 * other, x])[0]
                _same(both, total, f"y of v + 2 v' against y of v plus 2 times y of v' (bare: {mixer.bare})")
    if (scale := mixer.output_scale) is not None:
        _check(list(scale.shape) == [HEADS], f"output_scale is {list(scale.shape)}, expected {[HEADS]}")
        y = [run(mixer, [q, k, v, x])[0] for value in (0.0, 1.0, 2.0) if scale.fill_(value) is not None]
        _same(y[2] - y[1], y[1] - y[0], "the step of y from output_scale 1 to 2 against that from 0 to 1")


RULES: tuple[Callable[[Make], None], ...] = (
    every_parameter_has_an_init,
    shapes_are_right,
    training_weights_serve_the_model_dtype,
    a_plan_needs_no_data,
    training_mode_changes_nothing,
    saving_keeps_everything,
    nothing_depends_on_later_tokens,
    the_state_does_not_grow,
    pieces_equal_the_whole,
    rows_are_independent,
    padding_is_not_seen,
    documents_are_independent,
    grouped_heads_are_repeated_in_place,
    nothing_changes_in_place,
    branches_can_be_switched_off,
    declared_linearity_is_true,
)
"""All rules, in the order in which they are checked; the docstring of each is the rule."""
