"""A cache layer that holds a mixer's state inside Hugging Face's own cache objects.

`state_layer(cache, i)` gives the layer, putting it in the place of whatever the cache made for layer i. Its
size does not depend on how many tokens it has seen. A state cannot forget, so a layer that records its past
goes back to an earlier state and replays what it should keep: that is how assisted and prompt-lookup decoding
drop rejected tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

Replay = Callable[[Any, int], Any]
"""(state before a forward, n) -> state after the first n of its tokens."""


class StateLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """One layer's mixer state and the number of tokens it has seen.

    It is both a linear-attention layer (so that masks are sized by a softmax layer where there is one) and an
    ordinary one (so that `get_seq_length` works when every layer is linear).
    """

    is_compileable = True
    """Also while it records its past: where a layer says no, transformers 5.24 leaves out masks that hide the places to
    come of a static memory.
    """
    supports_early_init = False

    softmax: Any = None
    """A softmax layer of the same cache, which sizes the masks; None where there is none. It is all of the cache that
    a layer may hold: a way back to itself would keep a dropped cache in memory, and torch.compile from returning one.
    """

    def __init__(self) -> None:
        LinearAttentionCacheLayerMixin.__init__(self)
        CacheLayerMixin.__init__(self)
        self.state: Any = None
        self.length = 0
        self.pending: list[tuple[Any, int, Replay | None]] = []

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` works: from transformers 5.24 on, assisted decoding asks after the prompt."""
        return self.record_past

    def advance(self, state: Any, tokens: int, replay: Replay | None = None) -> None:
        """Store the state that a forward over `tokens` more tokens returned.

        `replay` is kept until the next `crop` if the layer records its past, with the inputs that it refers
        to.
        """
        if self.record_past:
            self.pending.append((self.state, tokens, replay))
        self.state = state
        self.length += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers before 5.18 asks the first layer, whatever it is, for the mask of the softmax layers.
        if self.softmax is not None:
            return self.softmax.get_mask_sizes(query_length)
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def nbytes(self) -> int:
        """Bytes of the state, all rows together."""
        return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(self.state) if leaf is not None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """States are small and move back with the first operation that uses them."""

    def reset(self) -> None:
        self.state = None
        self.length = 0
        self.is_initialized = False
        self.pending.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, which must have come since the last crop.

        Raises:
            NotImplementedError: when `activate_past_recording` was not called before they came.
            ValueError: for a positive number, which older versions of transformers took as a length.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, got {tokens_to_remove}")
        remove = -tokens_to_remove
        while remove > 0:
            last: tuple[Any, int, Replay | None] = self.pending.pop() if self.pending else (None, 0, None)
            past, tokens, replay = last
            if replay is None:
                raise NotImplementedError(
                    f"cannot drop the last {remove} tokens from a mixer's state: its past was not recorded; "
                    "call `cache.activate_past_recording()` before they are added, once a first forward has put the "
                    "model's states into the cache"
                )
            kept = max(tokens - remove, 0)
            self.state = replay(past, kept) if kept else past
            self.length -= tokens - kept
            remove -= tokens - kept
        self.pending.clear()

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("mixer states are created by their mixer")

    update = update_conv_state = update_recurrent_state = lazy_initialization  # type: ignore[assignment]

    def _map(self, fn: Any) -> None:
        self.pending.clear()  # it speaks of rows that are somewhere else now
        if self.state is not None:
            self.state = tree_map(lambda t: fn(t) if isinstance(t, torch.Tensor) else t, self.state)


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The state layer at `index` of `cache`, installed there first if the cache has another kind or none yet.

    Raises:
        ValueError: when a softmax layer has written to that place.
    """
    layers: list[Any] = cache.layers
    new_layer: Any = cache.layer_class_to_replicate
    while len(layers) <= index:
        layers.append(new_layer())
    layer = layers[index]
    if not isinstance(layer, StateLayer):
        if layer.is_initialized and (tokens := int(layer.get_seq_length())):
            raise ValueError(
                f"layer {index} already holds {tokens} tokens of a softmax layer in this cache; a mixer "
                "cannot continue from them, so give each path of a model its own cache"
            )
        layers[index] = layer = StateLayer()
        softmax = [x for x in layers if not isinstance(x, StateLayer) and not getattr(x, "is_sliding", False)]
        for state in (x for x in layers if isinstance(x, StateLayer)):
            state.softmax = softmax[0] if softmax else None
    return layer
