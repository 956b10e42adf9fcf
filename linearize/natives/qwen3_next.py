"""Qwen3-Next: Gated DeltaNet and softmax attention with an output gate, made of Qwen3 and Qwen3-MoE.

How its layers differ from a converted model's, and what makes them equal:

- RMS norms multiply by 1 + w, so w is the source's less 1. A source's w below 1/2 loses its last digits.
- Softmax heads are multiplied by sigmoid(gate). The gate gets no weights and a bias of 40, whose sigmoid is exactly 1
  in float32, float16 and bfloat16; the other biases are 0.
- In its Gated DeltaNet layers every query head has a key head of its own, so the projections and taps of shared key and
  value heads are repeated. Projections are interleaved by head. The norm before the gate is shared by the heads; ours,
  and the factor per head, go into the columns of the output projection.
- Every mixture of experts has a shared expert, here of width 1 and zero.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from linearize.kept import AS_IN_SOURCE
from linearize.natives.base import Conversion, Native, Tensors, Wanted, conversion, differing, made_of_parts
from linearize.registry import family_of

OPEN = 40.0
"""A gate's logit whose sigmoid rounds to 1 in every type of less than 57 bits."""
# fmt: off
COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
)
"""Settings that mean the same in both configurations."""
EXPERTS = (
    "decoder_sparse_step", "moe_intermediate_size", "num_experts_per_tok", "num_experts", "norm_topk_prob",
    "output_router_logits", "router_aux_loss_coef", "mlp_only_layers",
)
"""The same of Qwen3-MoE."""
# fmt: on
VLLM: dict[str, Any] = {"qkv_bias": True}
"""What vLLM (0.33) reads in place of `attention_bias`, without which it leaves out the gate's bias and says nothing."""
WANTED = (
    Wanted("feature_map", "identity", "its queries and keys have no feature map", part=True),
    Wanted("decay", "scalar", "its decay is that of Mamba-2", part=True),
    Wanted("decay.write", False, "dt does not scale what it writes"),
    Wanted("update", "delta", "it writes by the delta rule", part=True),
    Wanted("update.negative", False, "its write strength ends at 1"),
    Wanted("update.bias", False, "its write strength has no bias"),
    Wanted("normalize", False, "its read-out has no denominator"),
    Wanted("scale", "sqrt", "its queries are divided by the root of their size"),
    Wanted("window", 0, "its layers have no softmax window"),
    Wanted("rope", "none", "its linear layers see no positions"),
    Wanted("conv.size", 4, "its linear layers have a convolution over at least 2 tokens", ok=lambda size: size >= 2),
    Wanted("conv.inputs", "qkv", "it convolves queries, keys and values"),
    Wanted("conv.activation", "silu", "a silu follows its convolution"),
    Wanted("qk_norm", "none", "its delta rule normalises queries and keys by itself"),
    Wanted("source_norm", False, "nothing stands between its projections and its convolution"),
    Wanted("kv_heads", "shared", "its key and value heads have no second projection"),
    Wanted("output.norm", "rms", "an RMS norm follows its read-out"),
    Wanted("output.gate", "silu", "its read-out has a silu gate"),
    Wanted("output.gate_rank", None, "its gate is a full matrix"),
    Wanted("output.gate_bias", False, "its gate has no bias"),
    Wanted("skip", False, "it does not add the token's own value"),
)


class Qwen3Next(Native):
    """`model_type: qwen3_next`."""

    model_class = Qwen3NextForCausalLM
    sources = ("qwen3", "qwen3_moe")

    @classmethod
    def obstacles(cls, config: Any) -> list[str]:
        made = conversion(config)
        if made.source not in cls.sources:
            return [f"it can hold models made from {' or '.join(cls.sources)}, not from {made.source}"]
        found = list(dict.fromkeys(line for spec in made.layers if spec for line in _of_mixer(spec, config)))
        return found + _of_softmax(made, config) + _of_source(config)

    @classmethod
    def config(cls, config: Any) -> Qwen3NextConfig:
        made, shape = conversion(config), family_of(config).shape(config, 0)
        size = next(spec[1].conv.size for spec in made.layers if spec)
        experts = {name: getattr(config, name) for name in EXPERTS if made.source == "qwen3_moe"}
        dense = {"num_experts": 0, "mlp_only_layers": list(range(config.num_hidden_layers))}
        return Qwen3NextConfig(
            **{name: getattr(config, name) for name in COPIED},
            **(experts or dense),
            shared_expert_intermediate_size=1,
            head_dim=shape.key_dim,
            rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0},
            attention_bias=True,
            **VLLM,
            layer_types=["linear_attention" if spec else "full_attention" for spec in made.layers],
            linear_conv_kernel_dim=size,
            linear_key_head_dim=shape.key_dim,
            linear_value_head_dim=shape.value_dim,
            linear_num_key_heads=shape.heads,
            linear_num_value_heads=shape.heads,
        )

    @classmethod
    def weights(cls, tensors: Tensors, config: Any) -> Tensors:
        made, native = conversion(config), cls.config(config)
        out = {"model.norm.weight": tensors.pop("model.norm.weight") - 1}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            out[name] = tensors.pop(name)
        for index, spec in enumerate(made.layers):
            layer = f"model.layers.{index}."
            own = {name.removeprefix(layer): tensors.pop(name) for name in list(tensors) if name.startswith(layer)}
            done = _linear(own, native) if spec else _softmax(own, native)
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                done[name] = own.pop(name) - 1
            done.update({name: own.pop(name) for name in list(own) if name.startswith("mlp.")})
            if "mlp.gate.weight" in done:
                done |= _no_shared_expert(done["mlp.gate.weight"], native.hidden_size)
            out.update({layer + name: tensor for name, tensor in done.items()})
            tensors.update({layer + name: tensor for name, tensor in own.items()})
        return out


def _of_mixer(spec: tuple[type, Any], config: Any) -> list[str]:
    """What of a mixer stands in the way."""
    mixer, settings = spec
    if not made_of_parts(mixer):
        return [f"mixer {mixer.__name__} is not made of parts; take gdn with the settings of recipe qwen3_next"]
    found = differing(settings, WANTED)
    if (eps := config.rms_norm_eps) != settings.output.eps:
        found.append(f"mixer.output.eps is {settings.output.eps:g}: its norms share one eps; set it to {eps:g}")
    return found


def _of_softmax(made: Conversion, config: Any) -> list[str]:
    """What of the softmax layers that stayed stands in the way."""
    softmax = [index for index, spec in enumerate(made.layers) if spec is None]
    if not softmax:
        return ["layers keeps no softmax layer: transformers caches its models only with one; keep some, as in LLLS"]
    found, family = [], family_of(config)
    if made.kept != AS_IN_SOURCE:
        found.append(f"kept changes its softmax layers ({made.kept}); leave kept out")
    if windows := [str(index) for index in softmax if family.shape(config, index).reach is not None]:
        found.append(
            f"layers {', '.join(windows)} keep a sliding window, which it does not have; swap them with layers"
        )
    return found


def _of_source(config: Any) -> list[str]:
    """What of the source itself stands in the way."""
    found = []
    if config.hidden_act not in ("silu", "swish"):
        found.append(f"hidden_act of the source is {config.hidden_act}: its convolutions share it and have silu here")
    if config.attention_bias:
        found.append("the source's q, k, v and o projections have biases (attention_bias), its linear layers none")
    return found


def _softmax(own: Tensors, native: Any) -> Tensors:
    """Take a kept layer's attention out of `own`."""
    heads, size = native.num_attention_heads, native.head_dim
    q = own.pop("self_attn.q_proj.weight").view(heads, size, -1)
    done = {"self_attn.q_proj.weight": torch.cat([q, torch.zeros_like(q)], dim=1).flatten(0, 1)}
    gate = q.new_zeros(heads, 2 * size)
    gate[:, size:] = OPEN
    done["self_attn.q_proj.bias"] = gate.flatten()
    for name in ("k_proj", "v_proj", "o_proj"):
        weight = done[f"self_attn.{name}.weight"] = own.pop(f"self_attn.{name}.weight")
        done[f"self_attn.{name}.bias"] = weight.new_zeros(len(weight))
    for name in ("q_norm", "k_norm"):
        done[f"self_attn.{name}.weight"] = own.pop(f"self_attn.{name}.weight") - 1
    return done


def _linear(own: Tensors, native: Any) -> Tensors:
    """Take a swapped layer's attention and mixer out of `own`."""
    heads, size = native.linear_num_key_heads, native.linear_key_head_dim

    def expanded(rows: torch.Tensor) -> torch.Tensor:
        """[Hkv * D, ...] or [Hkv, D, ...] -> [Hq, D, ...]."""
        rows = rows.view(-1, size, rows.shape[-1])
        return rows.repeat_interleave(heads // len(rows), dim=0)

    for name in ("q_norm", "k_norm"):
        own.pop(f"self_attn.{name}.weight")  # source_norm is false: nothing reads them
    mixer = "self_attn.mixer."
    q, k, v = (expanded(own.pop(f"self_attn.{x}_proj.weight")) for x in "qkv")
    z = own.pop(f"{mixer}output.gate_up")
    taps = torch.cat([expanded(own.pop(f"{mixer}conv.taps.{x}")).flatten(0, 1) for x in "qkv"])
    b, a = own.pop(f"{mixer}update.beta.weight"), own.pop(f"{mixer}decay.weight")
    factors = own.pop(f"{mixer}output.norm_weight")
    if (scale := own.pop(f"{mixer}output.scale", None)) is not None:
        factors = factors * scale[:, None]
    return {
        "linear_attn.in_proj_qkvz.weight": torch.cat([q, k, v, z], dim=1).flatten(0, 1),
        "linear_attn.in_proj_ba.weight": torch.stack([b, a], dim=1).flatten(0, 1),
        "linear_attn.conv1d.weight": taps[:, None],
        "linear_attn.A_log": own.pop(f"{mixer}decay.log_rate"),
        "linear_attn.dt_bias": own.pop(f"{mixer}decay.bias"),
        "linear_attn.norm.weight": torch.ones_like(factors[0]),
        "linear_attn.out_proj.weight": own.pop("self_attn.o_proj.weight") * factors.flatten(),
    }


def _no_shared_expert(like: torch.Tensor, width: int) -> Tensors:
    """A shared expert of width 1 that adds nothing."""
    sizes = {"gate_proj": (1, width), "up_proj": (1, width), "down_proj": (width, 1)}
    shared = {f"mlp.shared_expert.{name}.weight": like.new_zeros(size) for name, size in sizes.items()}
    return {**shared, "mlp.shared_expert_gate.weight": like.new_zeros(1, width)}
