"""vLLM's kernels, called as `paged.Kernels` says. Imports vLLM, and its Triton kernels with it.

The recurrent pools are [slots, H, V, F] here as there. Rows that are padding have slot 0, vLLM's null block, which its
kernels leave alone in decoding; in a prefill there are none.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen
from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from vllm.third_party.flash_linear_attention.ops.kda import chunk_kda, fused_recurrent_kda

from linearize.serving.vllm.layout import chunks
from linearize.serving.vllm.paged import Rows

CHUNK = 128
"""Tokens that the state space kernel takes at once."""


class VllmKernels:
    """See `paged.Kernels`. `Rows.hints` are the metadata of vLLM's GDN backend."""

    def conv(self, x: torch.Tensor, taps: torch.Tensor, silu: bool, pool: torch.Tensor, rows: Rows) -> torch.Tensor:
        activation, states = "silu" if silu else None, pool.transpose(-1, -2)
        if rows.resumed is None:
            return causal_conv1d_update(x, states, taps, None, activation, conv_state_indices=rows.slots)
        return causal_conv1d_fn(
            x.transpose(0, 1),
            taps,
            None,
            states,
            rows.starts,
            cache_indices=rows.slots,
            has_initial_state=rows.resumed,
            activation=activation,
            metadata=rows.hints,
        ).transpose(0, 1)

    def delta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float,
        pool: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:
        per_channel = g.dim() == 4
        if rows.resumed is None:
            step = fused_recurrent_kda if per_channel else fused_recurrent_gated_delta_rule
            return step(
                q,
                k,
                v,
                g,
                beta,
                scale=scale,
                initial_state=pool,
                inplace_final_state=True,
                cu_seqlens=rows.starts,
                ssm_state_indices=rows.slots,
                use_qk_l2norm_in_kernel=False,
            )[0]
        chunk = chunk_kda if per_channel else chunk_gated_delta_rule
        y, after = chunk(
            q,
            k,
            v.clone() if per_channel else v,  # chunk_kda writes its output over it
            g,
            beta,
            scale=scale,
            initial_state=_before(pool, rows),
            output_final_state=True,
            cu_seqlens=rows.starts,
            use_qk_l2norm_in_kernel=False,
        )
        pool[rows.slots] = after.to(pool.dtype)
        return y

    def ssd(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dt: torch.Tensor,
        rate: torch.Tensor,
        pool: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:
        (q,), (k,), (v,), (dt,), out = q, k, v, dt, torch.empty_like(v[0])
        if rows.resumed is None:
            size, none = v.shape[-1], torch.zeros_like(rate)[:, None].expand(-1, v.shape[-1])
            selective_state_update(
                pool,
                v,
                dt[..., None].expand(-1, -1, size),
                rate[:, None, None].expand(-1, size, k.shape[-1]),
                k,
                q,
                none,
                none,
                state_batch_indices=rows.slots,
                out=out,
            )
            return out[None]
        ends, last, row = chunks(rows.starts.tolist(), CHUNK)
        after = mamba_chunk_scan_combined_varlen(
            v,
            dt,
            rate,
            k,
            q,
            CHUNK,
            rows.starts,
            *(rows.starts.new_tensor(numbers) for numbers in (ends, last, row)),
            out,
            initial_states=_before(pool, rows),
            state_dtype=torch.float32,
        )
        pool[rows.slots] = after.to(pool.dtype)
        return out[None]


def _before(pool: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The states that the rows go on from, zero where they begin."""
    assert rows.resumed is not None
    return pool[rows.slots].float().masked_fill(~rows.resumed[:, None, None, None], 0.0)
