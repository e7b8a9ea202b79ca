"""The KV cache: reserved capacity, and two lengths per layer.

The *logical* length is the number of tokens seen and drives positions; the *physical* one is the number of keys held and
drives masks. The stock cache uses one for both (any eviction then shifts positions) and concatenates the whole past at
every decode step, which flatters methods that shrink it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class KVLayer(DynamicLayer):
    """Keys and values of one layer, ``[B, Hkv, n, D]``, in one buffer that is written in place.

    The buffer is made at the first update, for that update's tokens plus `headroom` tokens to come; so a layer that is
    handed fewer tokens also reserves less. It grows only when the headroom was too small.
    """

    def __init__(self, headroom: int) -> None:
        super().__init__()
        self.headroom = headroom
        self.physical = 0
        self.evicted = 0
        """Tokens seen but not held: set by a method that drops tokens before or at this layer."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = self._reserve(key_states, key_states.shape[-2] + self.headroom)
        self._values = self._reserve(value_states, key_states.shape[-2] + self.headroom)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, Hkv, q, D]`` and return views of all keys and values held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self.physical, self.physical + key_states.shape[-2]
        if stop > self._keys.shape[-2]:
            capacity = max(stop, 2 * self._keys.shape[-2])
            self._keys = self._grown(self._keys, capacity)
            self._values = self._grown(self._values, capacity)
        self._keys[..., start:stop, :] = key_states
        self._values[..., start:stop, :] = value_states
        self.physical = stop
        self.keys, self.values = self._keys[..., :stop, :], self._values[..., :stop, :]
        return self.keys, self.values

    def crop(self, max_length: int) -> None:
        """Hold the first `max_length` tokens alone; the buffer keeps its size. Raises `ValueError` when it cannot."""
        if self.evicted or not 0 <= max_length <= self.physical:
            raise ValueError(f"cannot crop {self.physical} tokens held and {self.evicted} evicted to {max_length}")
        self.physical = max_length
        self.keys, self.values = self._keys[..., :max_length, :], self._values[..., :max_length, :]

    def keep(self, indices: Tensor) -> None:
        """Hold only these of the tokens held (int64 ``[n]``, sorted); the others count as evicted. Their memory is freed."""
        self.evicted += self.physical - len(indices)
        self.physical = len(indices)
        self._keys, self._values = (self._chosen(buffer, indices) for buffer in (self._keys, self._values))
        self.keys, self.values = self._keys[..., : self.physical, :], self._values[..., : self.physical, :]

    def _chosen(self, buffer: Tensor, indices: Tensor) -> Tensor:
        smaller = self._reserve(buffer, len(indices) + self.headroom)
        smaller[..., : len(indices), :] = buffer[..., indices, :]
        return smaller

    def get_seq_length(self, *args: Any) -> int:
        """Logical length: held and evicted."""
        return self.physical + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length including the coming queries, and the offset of the first key."""
        return self.physical + query_length, 0

    @property
    def used_bytes(self) -> int:
        return self._bytes(self.physical)

    @property
    def reserved_bytes(self) -> int:
        return self._bytes(self._keys.shape[-2]) if self.is_initialized else 0

    def _bytes(self, tokens: int) -> int:
        if not self.is_initialized:
            return 0
        return sum(t.numel() // t.shape[-2] * t.element_size() * tokens for t in (self._keys, self._values))

    @staticmethod
    def _reserve(states: Tensor, capacity: int) -> Tensor:
        return states.new_empty(*states.shape[:-2], capacity, states.shape[-1])

    @classmethod
    def _grown(cls, buffer: Tensor, capacity: int) -> Tensor:
        larger = cls._reserve(buffer, capacity)
        larger[..., : buffer.shape[-2], :] = buffer
        return larger


def new_cache(layers: int, headroom: int) -> Cache:
    """An empty cache with room for the prompt and `headroom` further tokens in every layer."""
    if headroom < 0:
        raise ValueError(f"headroom must be at least 0, not {headroom}")
    return Cache(layers=[KVLayer(headroom) for _ in range(layers)])


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """(bytes in use, bytes reserved) over all layers."""
    return sum(layer.used_bytes for layer in cache.layers), sum(layer.reserved_bytes for layer in cache.layers)


def lengths(cache: Cache) -> tuple[list[int], list[int]]:
    """(logical, physical) length of every layer."""
    return [layer.get_seq_length() for layer in cache.layers], [layer.physical for layer in cache.layers]
