"""What the plugin puts into vLLM: names of architectures, and a check of configurations before anything is built.

Imports vLLM, but neither models nor kernels. `install` is called by `register`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from linearize.errors import UserError
from linearize.hf import auto
from linearize.serving.vllm.layout import FAMILIES, adapt
from linearize.serving.vllm.support import supported

logger = logging.getLogger(__name__)


def install() -> None:
    """Register the class of each family that the plugin knows, by name, so that vLLM imports it when it needs it."""
    auto.register()
    for family in FAMILIES:
        name = auto.classes(family)[1].__name__
        ModelRegistry.register_model(name, f"linearize.serving.vllm.model:{name}")
        MODELS_CONFIG_MAP[name] = LinearizedConfig


class LinearizedConfig(VerifyAndUpdateConfig):
    """What vLLM asks about the configuration of a converted model."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Adapt the configuration, and leave out compilation and CUDA graphs, with which the layers were not tried.

        Raises:
            UserError: for a model that vLLM has no kernels for.
        """
        reason = supported(model_config.hf_config)
        if reason is not None:
            raise UserError(reason)
        adapt(model_config.hf_config)
        if not model_config.enforce_eager:
            logger.warning("converted models run as with --enforce-eager: without torch.compile and CUDA graphs")
            model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what the layers do not do, and leave out the caching of prefixes.

        Raises:
            UserError: for settings of vLLM that they were not made for.
        """
        found, cache = [], vllm_config.cache_config
        if vllm_config.model_config.dtype not in (torch.bfloat16, torch.float16):
            found.append("vLLM's kernels take no float32; give --dtype bfloat16")
        if vllm_config.model_config.quantization is not None:
            found.append("it was not tried with quantized weights; leave out --quantization")
        if vllm_config.lora_config is not None:
            found.append("it was not tried with LoRA; leave out --enable-lora, and merge it with lora.merge: true")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            found.append("it was not tried with layers on several processes; take --tensor-parallel-size")
        if vllm_config.speculative_config is not None:
            found.append("states cannot drop rejected tokens; leave out speculative decoding")
        if cache.mamba_cache_dtype != "auto" or cache.mamba_ssm_cache_dtype not in ("auto", "float32"):
            found.append("recurrent states are float32; leave out --mamba-cache-dtype and --mamba-ssm-cache-dtype")
        if found:
            raise UserError(f"linearize's plugin of vLLM: {'; '.join(found)}")
        if cache.enable_prefix_caching:
            logger.warning("converted models run as with --no-enable-prefix-caching: states are not kept by prefix")
            cache.enable_prefix_caching = False
