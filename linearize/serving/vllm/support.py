"""Which converted models vLLM can run: those whose recurrences are ones that it has kernels for.

| kernel | recurrence | mixers |
|---|---|---|
| `gated_delta_rule` | delta rule, a decay per head or none | `gdn` |
| `kda` | delta rule, a decay per channel | `kda` |
| `ssd` | sum with a decay dt * rate and weight dt per head, a constant decay or none | `mamba2`, `lightning`, ... |

Everything else of a mixer works token by token, and is its own code in vLLM too, so that it need not be known here.
"""

from __future__ import annotations

from typing import Any

from linearize.kept import AS_IN_SOURCE
from linearize.natives.base import Conversion, Wanted, conversion, differing, made_of_parts
from linearize.registry import family_of
from linearize.serving.vllm.layout import FAMILIES, full_mixer, states

FEATURES = 256
"""Most features of a key that the delta rules' kernels take."""
WANTED = (
    Wanted("update", "delta", "vLLM has kernels for delta and additive", True, ("delta", "additive").__contains__),
    Wanted("window", 0, "vLLM has no layer with both a softmax window and a recurrent state"),
    Wanted("normalize", False, "vLLM's kernels return no sum of weights"),
    Wanted("conv.size", 4, "vLLM's convolution takes 2 to 4 tokens", ok=(0, 2, 3, 4).__contains__),
)
REMEDY = (
    "`linearize serve` runs every checkpoint; for vLLM convert with mixer gdn, kda, mamba2, lightning or retnet, or "
    "from Qwen3-MoE with recipe qwen3_next, whose export vLLM knows without this plugin"
)


def supported(config: Any) -> str | None:
    """Why vLLM cannot run the converted model with this configuration, each reason and a remedy; None if it can."""
    made = conversion(config)
    if made.source not in FAMILIES:
        known = ", ".join(FAMILIES)
        return f"the plugin knows models made from {known}, not from {made.source}; {REMEDY}"
    found = _of_source(made, config)
    found += dict.fromkeys(line for spec in made.layers if spec for line in _of_mixer(spec, config))
    if not found and len(shapes := set(states(config).values())) > 1:
        found.append(f"layers have states of {len(shapes)} shapes, and vLLM wants one; use one mixer in all of them")
    return f"vLLM cannot run this model: {'; '.join(found)}; {REMEDY}" if found else None


def kernel(settings: Any) -> str | None:
    """Which of vLLM's kernels, as in the module docstring, a mixer with these settings needs; None if it has none."""
    granularity = settings.decay.part.granularity
    if settings.update.type == "delta":
        return "kda" if granularity == "channel" else "gated_delta_rule"
    constant = settings.decay.type in ("fixed", "none")
    return "ssd" if constant or (settings.decay.type == "scalar" and settings.decay.write) else None


def _of_source(made: Conversion, config: Any) -> list[str]:
    """What of the source and of the softmax layers that stayed stands in the way."""
    found, family = [], family_of(config)
    if all(spec is None for spec in made.layers):
        found.append("no layer has a mixer, so it is its source model, which vLLM knows")
    if made.kept != AS_IN_SOURCE:
        found.append(f"kept changes its softmax layers ({made.kept}); leave kept out")
    if any(family.reach(config, layer) is not None for layer in range(config.num_hidden_layers)):
        found.append("its source has sliding windows, beside which the plugin was not tried")
    return found


def _of_mixer(spec: tuple[type, Any], config: Any) -> list[str]:
    """What of a mixer stands in the way."""
    cls, settings = spec
    if not made_of_parts(cls):
        return [f"mixer {cls.__name__} is not made of parts, and vLLM has no kernel for it"]
    found = differing(settings, WANTED)
    if not found and kernel(settings) is None:
        what = "decay scalar without write" if settings.decay.type == "scalar" else f"decay {settings.decay.type}"
        found.append(f"vLLM has no kernel for a sum (update additive) with {what}, only for delta rules with it")
    if not found and settings.update.type == "delta":
        features = full_mixer(spec, family_of(config).shape(config, 0)).map_k.features
        if features > FEATURES:
            found.append(f"keys have {features} features, and vLLM's delta rules take at most {FEATURES}")
    return found
