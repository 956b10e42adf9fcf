"""Configuration and model classes of converted models, made per family.

`build_classes(family, find)` gives a config class with its own `model_type` ("linearized_llama") and a causal
LM class that swaps its layers as its config says. The toolkit registers them with the Auto classes; an
exported checkpoint carries a copy of this file and builds the same classes without the toolkit.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin

from linearize.arguments import cache_of
from linearize.families.base import CONVERTED, Family
from linearize.hf.cache import state_layer
from linearize.kept import kept_of
from linearize.mixers.base import Find, Mixer
from linearize.swap import mixer_specs, swap_layers, swapped


def build_classes(family: type[Family], find: Find, module: str) -> tuple[type, type]:
    """Make the (config class, model class) of converted `family` models.

    Args:
        family: the architecture.
        find: (package, key), as the config has it -> class of a mixer or of one of its parts.
        module: name of the module that will hold the classes.
    """
    source = family.config_class
    name = family.model_class.__name__

    config_class: Any = strict(
        type(
            f"Linearized{source.__name__}",
            (source,),
            {
                "__module__": module,
                "__doc__": f"{source.__name__} plus `linearize`: which mixer serves which layer.",
                "__annotations__": {"linearize": dict | None},
                "model_type": f"{CONVERTED}{source.model_type}",  # type: ignore[attr-defined]
                "linearize": None,
            },
        )
    )

    bases: tuple[type, ...] = (family.model_class,)
    if issubclass(family.model_class, GenerationMixin):
        # Without it among the direct bases, transformers puts another class in this one's place.
        bases = (family.model_class, GenerationMixin)

    class Linearized(*bases):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            specs = mixer_specs(config.linearize, find)
            swap_layers(self, family.of(config, find), specs, kept_of(config.linearize))
            if not any(p.is_meta for p in self.parameters()):  # post_init ran before there were mixers
                for attn in swapped(self).values():
                    self._init_mixer(attn.mixer)

        def _init_weights(self, module: Any) -> None:
            super()._init_weights(module)
            if isinstance(module, Mixer):
                self._init_mixer(module)

        @torch.no_grad()
        def _init_mixer(self, mixer: Mixer) -> None:
            # from_pretrained calls this too, with the tensors it has read marked; those it keeps
            name = next(f"{n}.mixer" for n, attn in swapped(self).items() if attn.mixer is mixer)
            inits = mixer.inits()
            for key, parameter in mixer.named_parameters():
                if not getattr(parameter, "_is_hf_initialized", False):
                    inits[key].fill(parameter, name=f"{name}.{key}", seed=0)

        def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
        ) -> Any:
            result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            cache = cache_of(model_kwargs)
            if cache is not None:
                for attn in (a for a in swapped(self).values() if not a.teacher):
                    state_layer(cache, int(attn.layer_idx))  # type: ignore[arg-type]
                if generation_config.is_assistant:  # the call above marked the layers that were just replaced
                    cache.activate_past_recording()
            return result

        def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config: Any) -> bool:
            # Drafts have ever other lengths, and the inputs of a state that records its past are kept to be replayed.
            if any(getattr(layer, "record_past", False) for layer in getattr(cache_of(model_kwargs), "layers", ())):
                return False
            # A state is a new tensor after every step, which a CUDA graph that is run again would overwrite.
            chosen = generation_config.compile_config
            records = chosen is None or chosen.mode in ("reduce-overhead", "max-autotune")
            if self.device.type == "cuda" and records:
                return False
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            # Under the names that modules have here: from_pretrained translates a hub's older ones for the source's
            # class, but not for this one.
            return super().save_pretrained(save_directory, *args, **{**kwargs, "save_original_format": False})

        @staticmethod
        def create_masks_for_generate(
            config: Any, inputs_embeds: Any, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            # Swapped layers read padding from the 2-D mask; softmax layers expand it themselves.
            return attention_mask

    Linearized.__name__ = Linearized.__qualname__ = f"Linearized{name}"
    Linearized.__module__ = module
    Linearized.__doc__ = f"{name} with some or all attention layers replaced by linear mixers."
    Linearized.config_class = config_class
    Linearized.config = None
    Linearized.__annotations__ = {"config": config_class}
    return config_class, Linearized
