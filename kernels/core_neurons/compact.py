"""A gated FFN of a few of its neurons: their weights copied once, then ordinary dense products of the smaller size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class CompactFFN(NamedTuple):
    gate: Tensor
    """``[K, C]``"""
    up: Tensor
    """``[K, C]``"""
    down: Tensor
    """``[C, K]``"""

    def __call__(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """``down · (act(gate · x) ⊙ (up · x))`` of ``x [..., C]``."""
        inner = act(functional.linear(x, self.gate)) * functional.linear(x, self.up)
        return functional.linear(inner, self.down)

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self)


def compact(gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor) -> CompactFFN:
    """Copies of what ``neurons``, int64 ``[K]``, have in ``gate, up [D, C]`` and ``down [C, D]``."""
    return CompactFFN(gate.index_select(0, neurons), up.index_select(0, neurons), down.index_select(1, neurons))
