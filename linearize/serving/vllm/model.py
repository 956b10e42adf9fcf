"""The classes that vLLM makes of converted models: its own of the source, with mixers in the layers that have one.

vLLM's class builds the source's layers. In a swapped layer `LinearizedAttention` takes the place of vLLM's attention,
with its projections, norms and rotary embedding, and the layer has states in the cache instead of keys and values.
Layers that keep softmax are vLLM's own. docs/serving.md says what of this has been run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linearize.errors import UserError
from linearize.mixers.base import Context, HeadShape
from linearize.natives.base import conversion
from linearize.registry import family_of
from linearize.serving.vllm.kernels import VllmKernels
from linearize.serving.vllm.layout import Shapes, Spec, local_shape, place, shard, state_dtypes, states
from linearize.serving.vllm.paged import Rows, Slots, paged


class LinearizedAttention(nn.Module, MambaBase):
    """A swapped layer's attention. It is called as vLLM's, and keeps the names of its modules.

    Args:
        attn: the attention that vLLM built for the layer.
        spec: class and config of the mixer.
        shape: the whole layer's.
        shapes: of this process's states.
        vllm_config: vLLM's.

    Raises:
        UserError: for heads of a size that vLLM's class of the source does not have.
    """

    def __init__(self, attn: Any, spec: Spec, shape: HeadShape, shapes: Shapes, vllm_config: Any):
        super().__init__()
        if attn.head_dim != shape.key_dim:
            raise UserError(
                f"vLLM's {type(attn).__name__} has heads of {attn.head_dim} channels, and the checkpoint of "
                f"{shape.key_dim}; take `linearize serve`"
            )
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.qkv_proj, self.o_proj, self.rotary_emb = attn.qkv_proj, attn.o_proj, attn.rotary_emb
        self.q_norm, self.k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self.mixer = paged(spec, shape, rank, size)
        for parameter in self.mixer.parameters():
            parameter.requires_grad_(False).weight_loader = _Sharded(rank)
        self.shape, self.kernels = local_shape(shape, size), VllmKernels()
        self.shapes, self.dtypes = shapes, state_dtypes(shapes, vllm_config.model_config.dtype)
        layers = vllm_config.compilation_config.static_forward_context
        del layers[attn.attn.layer_name]  # its keys and values
        self.prefix = attn.attn.layer_name.removesuffix(".attn")
        layers[self.prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_shape(self) -> Shapes:
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes

    @torch.no_grad()
    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [N], hidden_states [N, C] -> [N, C]; tokens beyond those that vLLM's metadata count are padding."""
        metadata = get_forward_context().attn_metadata
        found = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        tokens = len(hidden_states) if found is None else found.num_actual_tokens
        qkv = self.qkv_proj(hidden_states)[0]
        heads = qkv.new_zeros(len(qkv), self.shape.heads * self.shape.value_dim)
        heads[:tokens] = self._mix(qkv[:tokens], hidden_states[:tokens], positions[..., :tokens], found)
        return self.o_proj(heads)[0]

    def _mix(self, qkv: torch.Tensor, x: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor:
        shape = self.shape
        sizes = [shape.heads * shape.key_dim, shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim]
        q, k, v = (part.unflatten(-1, (-1, shape.key_dim)) for part in qkv.split(sizes, dim=-1))
        if self.q_norm is not None and self.k_norm is not None and self.mixer.source_norm:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())

        def rotary(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # vLLM turns in place
            turned = self.rotary_emb(positions, *(t[0].flatten(1).to(x.dtype).clone() for t in (q, k)))
            return turned[0].view(q.shape), turned[1].view(k.shape)

        pools: Any = [None] if metadata is None else self.kv_cache
        rows = None if metadata is None else _rows(metadata)
        slots = [Slots(pool, rows, self.kernels) for pool in pools]
        state = {"conv": slots[0], "linear": slots[-1]}
        y, _ = self.mixer(q[None], k[None], v[None], x[None], Context(rotary), state)
        return y[0].flatten(1)


def _rows(metadata: Any) -> Rows:
    """The requests of a batch, from the metadata of vLLM's GDN backend; padding behind them is left out."""
    count = metadata.num_prefills + metadata.num_decodes
    resumed = metadata.has_initial_state[:count] if metadata.num_prefills else None
    starts, slots = metadata.non_spec_query_start_loc, metadata.non_spec_state_indices_tensor
    return Rows(starts[: count + 1], slots[:count].contiguous(), resumed, metadata)


class _Sharded:
    """Loads a process's part of a mixer's tensor."""

    def __init__(self, rank: int):
        self.rank = rank

    def __call__(self, parameter: torch.Tensor, whole: torch.Tensor) -> None:
        parameter.data.copy_(shard(whole, parameter.shape, self.rank))


class _Linearized:
    """What stands before vLLM's class of the source."""

    has_inner_state = True
    is_hybrid = True

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config, size = self.config, get_tensor_model_parallel_world_size()  # type: ignore[attr-defined]
        family, shapes = family_of(config), states(config, size)
        for layer, spec in enumerate(conversion(config).layers):
            if spec is not None:
                block = self.model.layers[layer]  # type: ignore[attr-defined]
                shape = family.shape(config, layer)
                block.self_attn = LinearizedAttention(block.self_attn, spec, shape, shapes[layer], vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Shapes:
        size = vllm_config.parallel_config.tensor_parallel_size
        return next(iter(states(vllm_config.model_config.hf_config, size).values()))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return state_dtypes(cls.get_mamba_state_shape_from_config(vllm_config), vllm_config.model_config.dtype)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load every tensor of a checkpoint into its place.

        Raises:
            UserError: for a tensor without a place, and a parameter that is not loaded.
        """
        held = dict(self.named_parameters())  # type: ignore[attr-defined]
        loaded = set()
        for name, tensor in weights:
            there, part = place(name)
            if there not in held:
                raise UserError(f"the checkpoint has a tensor {name}, for which vLLM's class of the model has no place")
            load = getattr(held[there], "weight_loader", default_weight_loader)
            load(held[there], tensor, *([] if part is None else [part]))
            loaded.add(there)
        if missing := sorted(held.keys() - loaded):
            raise UserError(f"the checkpoint has no tensor for {missing[0]}; export it anew")
        return loaded


class LinearizedLlamaForCausalLM(_Linearized, LlamaForCausalLM):
    """Made of Llama."""


class LinearizedMistralForCausalLM(_Linearized, MistralForCausalLM):
    """Made of Mistral."""


class LinearizedQwen2ForCausalLM(_Linearized, Qwen2ForCausalLM):
    """Made of Qwen2 and Qwen2.5."""


class LinearizedQwen3ForCausalLM(_Linearized, Qwen3ForCausalLM):
    """Made of Qwen3."""
