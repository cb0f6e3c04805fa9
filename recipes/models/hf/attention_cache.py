"""Cache layers of transformers for attention experts, with keys and values of the tokens routed to each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from moe.attention.attention_memory import KeyMemory
from moe.errors import ModelError


def memory_of(cache: Cache, layer: int) -> KeyMemory:
    """Returns the memory of a layer of attention experts; an empty layer of the cache becomes one of them.

    Args:
        cache: The dynamic cache that `generate` passes along.
        layer: Index of the block.

    Raises:
        ModelError: The cache is of another kind.
    """
    made_later = cache.layer_class_to_replicate
    while made_later is not None and len(cache.layers) <= layer:
        cache.layers.append(made_later())
    found: Any = cache.layers[layer]
    if isinstance(found, ExpertCacheLayer):
        return found.memory
    plain = type(found) in (DynamicLayer, DynamicSlidingWindowLayer)
    if cache.offloading or not plain or found.get_seq_length() > 0:
        rule = "attention experts keep their own keys, which only a dynamic cache on the device has room for"
        raise ModelError.one("cache", type(found).__name__, rule, "Use cache_implementation='dynamic'.")
    window = found.sliding_window if isinstance(found, DynamicSlidingWindowLayer) else None
    cache.layers[layer] = made = ExpertCacheLayer(window)
    return made.memory


class ExpertCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """Cache layer that counts all tokens and holds keys and values of those routed to each expert.

    Attributes:
        memory: The keys and values.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.memory = KeyMemory(window)
        self.is_initialized = True

    @property
    def is_sliding(self) -> bool:
        """True if old positions are dropped."""
        return self.memory.window is not None

    @property
    def is_croppable(self) -> bool:
        """True if positions can be removed again, which a window does not allow."""
        return self.memory.window is None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing; the layer is initialised from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Always fails: the experts extend `memory` themselves, and dense attention must not."""
        raise AssertionError("a dense attention updates the cache of attention experts")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of columns of a mask and the position of the first, as dense layers do."""
        seen, window = self.memory.num_tokens, self.memory.window
        offset = 0 if window is None else max(seen - window + 1, 0)
        return seen - offset + query_length, offset

    def get_seq_length(self) -> int:
        """Returns the number of positions seen."""
        return self.memory.num_tokens

    def get_max_length(self) -> int:
        """Returns the window, or -1 without one, as dense layers do."""
        return -1 if self.memory.window is None else self.memory.window

    def reset(self) -> None:
        """Drops all keys and values."""
        self.memory = KeyMemory(self.memory.window)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last positions, whose number is given as 0 or a negative number.

        Raises:
            ValueError: The number is positive, or a window has dropped positions that would be needed again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the positions to remove as a negative number")
        if tokens_to_remove == 0:
            return
        if not self.is_croppable:
            raise ValueError("a window has dropped positions that would be needed again")
        self.memory.crop(self.memory.num_tokens + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continues with other beams."""
        self.memory.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Continues with some of the sequences."""
        self.memory.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence, its copies one after the other."""
        for found in self.memory.experts.values():
            count = len(found.count_B)
            self.memory.take(torch.arange(count, device=found.count_B.device).repeat_interleave(repeats))
            return
