"""TTT-linear: the state is a linear model that the tokens train, by gradient descent in mini-batches.

Source: Sun et al. 2024, arXiv 2407.04620, sections 2.3 - 2.7. The inner model is f(x) = x + LN(x W + b), its loss for a
token 0.5 |f(k) - v|^2. All gradients of a mini-batch are taken at the weights with which it starts, and token t is read
with its gradients up to t; mini-batches count from the start of the row. `ttt_linear` is the operator.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import torch

from linearize.ops.layout import expand_heads, from_chunks, shifted, to_chunks
from linearize.ops.recurrence import Recurrence, run

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, State]
Pair = tuple[torch.Tensor, torch.Tensor]


class Inner(NamedTuple):
    """What the inner model brings besides tokens, by query head: everything that is not `[B, T, ...]`."""

    ln_w: torch.Tensor
    ln_b: torch.Tensor
    w0: torch.Tensor
    b0: torch.Tensor
    eps: float
    batch_tokens: int

    def start(self, q: torch.Tensor, state: State | None) -> State:
        """The incoming state or, for q `[B, T, H, K]`, that before any token."""
        if state is not None:
            return state
        W, b = (x.to(q.dtype).expand(q.shape[0], *x.shape) for x in (self.w0, self.b0))
        return W, b, torch.zeros_like(W), torch.zeros_like(b), torch.zeros(len(q), dtype=torch.int64, device=q.device)

    def loss_gradient(self, z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """d/dz of 0.5 |LN(z) - target|^2, z and target `[B, H, c, V]`."""
        ln_w, ln_b = (x.to(z.dtype).unsqueeze(-2) for x in (self.ln_w, self.ln_b))
        unit, deviation = standardised(z, self.eps)
        error = ln_w * (ln_w * unit + ln_b - target)
        return (error - error.mean(-1, keepdim=True) - unit * (error * unit).mean(-1, keepdim=True)) / deviation

    def normalised(self, z: torch.Tensor) -> torch.Tensor:
        """LN(z), z `[B, T, H, V]`."""
        return self.ln_w.to(z.dtype) * standardised(z, self.eps)[0] + self.ln_b.to(z.dtype)


def standardised(z: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """z with mean 0 and variance 1 over its channels, and the deviation it was divided by, `[..., 1]`."""
    centred = z - z.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation, deviation


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eta: torch.Tensor,
    gain: torch.Tensor,
    present: torch.Tensor,
    *,
    state: State | None,
    inner: Inner,
) -> Result:
    """Token by token, also for decoding; the outputs are q W_t + b_t, before norm and residual.

    W and b are the weights at the mini-batch's start, dW and db the sums of eta times their gradients since, count the
    tokens since. Token t reads with W - gain_t dW; when the mini-batch is full, its last token's weights stay.
    """
    W, b, dW, db, count = inner.start(q, state)
    outs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = q[:, t].unsqueeze(-2), k[:, t].unsqueeze(-2), v[:, t].unsqueeze(-2)
        step = eta[:, t, :, None, None] * inner.loss_gradient(k_t @ W + b.unsqueeze(-2), v_t - k_t)
        dW, db = dW + k_t.transpose(-1, -2) * step, db + step.squeeze(-2)
        new_W, new_b = W - gain[:, t, :, None, None] * dW, b - gain[:, t, :, None] * db
        outs.append((q_t @ new_W).squeeze(-2) + new_b)
        count = count + present[:, t, 0].long()
        full = count == inner.batch_tokens
        (W, b), (dW, db) = _settle(full, (W, b), (new_W, new_b), (dW, db))
        count = torch.where(full, 0, count)
    return torch.stack(outs, dim=1), (W, b, dW, db, count)


def _settle(full: torch.Tensor, old: Pair, new: Pair, steps: Pair) -> tuple[Pair, Pair]:
    """The start weights and the steps since after a token: rows whose mini-batch is `full` `[B]` begin another one."""
    wide, narrow = full[:, None, None, None], full[:, None, None]
    return (
        (torch.where(wide, new[0], old[0]), torch.where(narrow, new[1], old[1])),
        (torch.where(wide, 0, steps[0]), torch.where(narrow, 0, steps[1])),
    )


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eta: torch.Tensor,
    gain: torch.Tensor,
    present: torch.Tensor,
    *,
    state: State | None,
    chunk_size: int,
    inner: Inner,
) -> Result:
    """The same by mini-batches (the dual form, section 2.5); chunk_size has nothing to decide.

    A row that goes on in the middle of a mini-batch is shifted, so that those of all rows begin together; in the places
    that this leaves free eta is 0. No weights are ever formed for a single token.
    """
    T, size = q.shape[1], inner.batch_tokens
    W, b, dW, db, count = inner.start(q, state)
    inputs = [q, k, v, eta, gain]
    if state is not None:
        inputs = [shifted(x, -count, T + size - 1) for x in inputs]
    total = count + present[..., 0].long().sum(1)
    q, k, v, eta, gain = (to_chunks(x, size) for x in inputs)
    eta, gain = eta.unsqueeze(-1), gain.unsqueeze(-1)
    scores = (q @ k.transpose(-1, -2) + 1).tril()  # the 1 is the bias's constant input
    outs = []
    for n, (q_n, k_n, v_n, scores_n) in enumerate(zip(*(x.unbind(2) for x in (q, k, v, scores)), strict=True)):
        read, z = (torch.cat([q_n, k_n], dim=-2) @ W + b.unsqueeze(-2)).split(size, dim=-2)
        step = eta[:, :, n] * inner.loss_gradient(z, v_n - k_n)
        moved = scores_n @ step
        if n == 0 and state is not None:  # later on, only rows that have ended hold a part of a mini-batch
            moved = moved + q_n @ dW + db.unsqueeze(-2)
        outs.append(read - gain[:, :, n] * moved)
        dW, db = dW + k_n.transpose(-1, -2) @ step, db + step.sum(-2)
        last = gain[:, :, n, -1]
        new = W - last.unsqueeze(-1) * dW, b - last * db
        (W, b), (dW, db) = _settle((n + 1) * size <= total, (W, b), new, (dW, db))
    out = from_chunks(torch.stack(outs, dim=2), len(outs) * size)
    out = out[:, :T] if state is None else shifted(out, count, T)
    return out, (W, b, dW, db, total % size)


# fla's chunk_ttt_linear has one rate per read-out and none per gradient, adds x W + b instead of x to the norm, needs
# rows that begin and end with a mini-batch, and stores no part of one: no kernel.
TTT = Recurrence("ttt_linear", naive, chunk, naive, resets=False)


def ttt_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eta: torch.Tensor,
    ln_w: torch.Tensor,
    ln_b: torch.Tensor,
    w0: torch.Tensor,
    b0: torch.Tensor,
    gain: torch.Tensor | None = None,
    *,
    batch_tokens: int = 16,
    eps: float = 1e-6,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Result:
    """y_t = f(scale * q_t; W_t), f(x; W) = x + LN(x W + b), W_t = W - gain_t sum_s eta_s d/dW 0.5 |f(k_s; W) - v_s|^2
    over the tokens s <= t of t's mini-batch, W from its start, and likewise b (arXiv 2407.04620, sections 2.3 - 2.7).

    q `[B, T, Hq, D]`, k and v `[B, T, Hkv, D]`, one size D for all three; eta `[B, T, H]` learning rate of each token's
    gradient; gain `[B, T, H]` what token t multiplies all of its mini-batch's steps with (the released code's factor of
    the place in the mini-batch; 1 without it), its last token's counts for what comes after; ln_w, ln_b, b0
    `[H, D]`, w0 `[H, D, D]`: the norm and the weights before the first token; H is Hq or Hkv. k is meant to have about
    unit norm: steps are stable for eta |k|^2 well below 2. batch_tokens is the mini-batch and changes results;
    mask `[B, T]` bool, real tokens first in each row; documents `[B, T]` int, non-decreasing; state as returned;
    chunk_size, a power of two, is accepted as by all operators and changes nothing.
    Returns y `[B, T, Hq, D]` in v's dtype and the state (W `[B, Hq, D, D]`, b `[B, Hq, D]` at the mini-batch's start,
    dW and db the sums of eta times their gradients since, in float32, float64 for float64 inputs; count `[B]` int64,
    tokens since); with documents it is that of the row's last document. Padding changes no state; y at padding carries
    no meaning.
    Raises ValueError for shapes that do not fit, documents with a state, or a backend that cannot be met.
    """
    heads, D = q.shape[2:]
    if v.shape[-1] != D:
        raise ValueError(
            f"ttt_linear: f(x) = x + LN(x W + b) needs keys and values of one size, got {D}, {v.shape[-1]}"
        )
    if batch_tokens < 1:
        raise ValueError(f"ttt_linear: batch_tokens must be at least 1, got {batch_tokens}")
    gain = torch.ones_like(eta) if gain is None else gain
    for name, gate in (("eta", eta), ("gain", gain)):
        if gate.dim() != 3:
            raise ValueError(f"ttt_linear: {name} must be [B, T, H], got {tuple(gate.shape)} beside q {tuple(q.shape)}")
    for name, x, shape in (("ln_w", ln_w, (D,)), ("ln_b", ln_b, (D,)), ("w0", w0, (D, D)), ("b0", b0, (D,))):
        if x.shape[1:] != shape:
            raise ValueError(f"ttt_linear: {name} must be [H, {', '.join(map(str, shape))}], got {tuple(x.shape)}")
    ln_w, ln_b, w0, b0 = (expand_heads(x[None, None], heads)[0, 0] for x in (ln_w, ln_b, w0, b0))
    inner = Inner(ln_w, ln_b, w0, b0, eps, batch_tokens)
    read, state = run_inner(
        inner,
        q,
        k,
        v,
        eta,
        gain,
        scale=scale,
        mask=mask,
        documents=documents,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
    )
    return (q.to(read.dtype) * scale + inner.normalised(read)).to(v.dtype), state


def run_inner(
    inner: Inner, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor, gain: torch.Tensor, **options
) -> Result:
    """q_t W_t + b_t `[B, T, Hq, D]` in the working dtype, and the state; arguments as `ttt_linear`."""
    loop = partial(naive, inner=inner)
    op = dataclasses.replace(TTT, naive=loop, chunk=partial(chunk, inner=inner), step=loop)
    return run(op, q, k, v, (eta, gain, q.new_ones(*q.shape[:2], 1)), **options)
