"""A plugin of vLLM (0.33) for converted models, an optional part: pip install "linearize[vllm]".

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`; from then on
`vllm serve my-model` knows the architectures of `layout.FAMILIES`. Files, from what runs anywhere to what does not:

- `support`: which mixers vLLM has kernels for, and why another one is refused.
- `layout`: shapes and types of states, names of weights, shards of mixers, what vLLM reads in a configuration.
- `paged`: a mixer on tokens of many requests in a row, whose states lie in slots of a pool; plain torch.
- `kernels`: the calls of vLLM's kernels.
- `config`, `model`: what vLLM takes; they import it.

Nothing imports vLLM before `register` is called. No GPU has run this: the engine ran on a CPU, its Triton kernels in
Triton's interpreter; docs/serving.md says with what result, and what is left out.
"""

from __future__ import annotations

import importlib.metadata
import logging

VERSIONS = ("0.33", "0.34")
"""The first version of vLLM that this was written against, and the first that it was not."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know the converted architectures; nothing happens without vLLM, or, but for a warning, in a version of
    it that this was not written against. Calls may be repeated.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return
    if not known(version):
        logger.warning(
            "linearize's plugin is for vLLM from %s up to, not including, %s, and this is %s: converted models are not "
            "known to it; install vllm==%s.*, or take `linearize serve`",
            *VERSIONS,
            version,
            VERSIONS[0],
        )
        return
    from linearize.serving.vllm.config import install

    install()


def known(version: str) -> bool:
    """Whether this was written against that version of vLLM."""
    first, beyond = (tuple(map(int, text.split("."))) for text in VERSIONS)
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return first <= found < beyond
