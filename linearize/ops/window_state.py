"""The constant-size state of sliding-window attention: a ring of the last tokens, and the sinks.

Used through `linearize.ops.window`, which re-exports `State`, `init_state` and `leaving`. The ring is
right-aligned, newest token last, so new tokens follow it by concatenation.
"""

import torch

from linearize.ops.documents import fill_padding, positions

State = dict[str, torch.Tensor]


def init_state(
    batch: int,
    window: int,
    sinks: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> State:
    """The state before any token; its size never changes.

    k, v `[B, window, Hkv, D]` the last tokens and valid `[B, window]` bool which of them exist; seen `[B]`
    int64 real tokens so far; sink_k, sink_v `[B, sinks, Hkv, D]` the first ones (absent when sinks is 0).
    """

    def zeros(length: int, dim: int) -> torch.Tensor:
        return torch.zeros(batch, length, kv_heads, dim, dtype=dtype, device=device)

    state = {
        "k": zeros(window, k_dim),
        "v": zeros(window, v_dim),
        "valid": torch.zeros(batch, window, dtype=torch.bool, device=device),
        "seen": torch.zeros(batch, dtype=torch.int64, device=device),
    }
    if sinks:
        state |= {"sink_k": zeros(sinks, k_dim), "sink_v": zeros(sinks, v_dim)}
    return state


def check_state(window: int, sinks: int, state: State | None) -> None:
    """Raises ValueError for impossible sizes and for a state made for others."""
    if window < 1 or sinks < 0:
        raise ValueError(f"window must be at least 1 and sinks at least 0, got window={window}, sinks={sinks}")
    if state is None:
        return
    ring, slots = state["k"].shape[1], state["sink_k"].shape[1] if "sink_k" in state else 0
    if (ring, slots) != (window, sinks):
        raise ValueError(
            f"the state was made for window={ring}, sinks={slots}, the call asks for window={window}, "
            f"sinks={sinks}; use init_state with the same sizes"
        )


def last_tokens(x: torch.Tensor, ring: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The last `window` real tokens of ring `[B, window, ...]` followed by x `[B, T, ...]`, newest last."""
    window, T = ring.shape[1], x.shape[1]
    if mask is None:
        return x[:, -window:].clone() if window <= T else torch.cat([ring[:, T:], x], dim=1)
    index = mask.sum(1)[:, None] + torch.arange(window, device=x.device)
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([ring, x], dim=1).gather(1, index)


def _first_tokens(x: torch.Tensor, sink: torch.Tensor, source: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """sink `[B, S, H, D]` with slot s taken from token source[:, s] of x `[B, T, H, D]` if 0 <= source <
    count.
    """
    index = source.clamp(0, x.shape[1] - 1)[..., None, None].expand(-1, -1, *x.shape[2:])
    arrived = ((source >= 0) & (source < count[:, None]))[..., None, None]
    return torch.where(arrived, x.gather(1, index), sink)


def advance(
    state: State, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, documents: torch.Tensor | None
) -> State:
    """The state after tokens k, v `[B, T, Hkv, D]`; with documents, that of the row's last document alone."""
    real = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    count = real.sum(1)
    valid = real
    if documents is not None:
        valid = real & (documents == fill_padding(documents, mask)[:, -1:])
    arrived = valid.sum(1)
    after = {
        "k": last_tokens(k.to(state["k"].dtype), state["k"], mask),
        "v": last_tokens(v.to(state["v"].dtype), state["v"], mask),
        "valid": last_tokens(valid, state["valid"], mask),
        "seen": state["seen"] + arrived,
    }
    if "sink_k" in state:
        slots = torch.arange(state["sink_k"].shape[1], device=k.device)
        source = slots + (count - arrived - state["seen"])[:, None]
        after["sink_k"] = _first_tokens(k.to(state["sink_k"].dtype), state["sink_k"], source, count)
        after["sink_v"] = _first_tokens(v.to(state["sink_v"].dtype), state["sink_v"], source, count)
    return after


def leaving(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    sinks: int = 0,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    state: State | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token that leaves the window at each step: position t gets token t - window of its row.

    Arguments as `window_attention`; call it with the state from before that call. Returns k `[B, T, Hkv, K]`,
    v `[B, T, Hkv, V]` and valid `[B, T]` bool. valid is False where no token leaves, where it is a sink of its
    document, where its document is not that of position t (nobody can read it any more) and where position t is
    padding; k and v carry no meaning there: zero them after the feature map.
    """
    check_state(window, sinks, state)
    if documents is not None and state is not None:
        raise ValueError("leaving: documents cannot be combined with an incoming state; pass state=None")
    B, T, kv_heads = k.shape[:3]
    if state is None:
        kept = torch.promote_types(k.dtype, v.dtype)
        state = init_state(B, window, sinks, kv_heads, k.shape[-1], v.shape[-1], kept, k.device)
    real = k.new_ones(B, T, dtype=torch.bool) if mask is None else mask

    def shifted(x: torch.Tensor, ring: torch.Tensor) -> torch.Tensor:
        return torch.cat([ring[:, :T].to(x.dtype), x[:, : max(T - window, 0)]], dim=1)

    valid = shifted(real, state["valid"]) & real
    if documents is None:
        position = state["seen"][:, None] + torch.arange(T, device=k.device) - window
    else:
        # In the same document it has this position; in an earlier one this is negative, so never valid.
        position = positions(documents)[1] - window
    return shifted(k, state["k"]), shifted(v, state["v"]), valid & (position >= sinks)
