"""The same FFN of a few neurons with less of it copied: gate and up are read by index, columns of down alone are copied."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from vlmbench.kernels.block_attention import SlowPath
from vlmbench.kernels.core_neurons import fused
from vlmbench.kernels.core_neurons.compact import Matrix
from vlmbench.kernels.int8_linear import Int8Matrix


class GatheredFFN(NamedTuple):
    gate: Tensor
    """``[D, C]``, the layer's own."""
    up: Tensor
    """``[D, C]``, the layer's own."""
    down: Tensor
    """``[C, P]``: a copy of K columns, then zeros up to a multiple of `fused.PADDED`."""
    neurons: Tensor
    """int32 ``[K]``"""

    def __call__(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """``down · (act(gate · x) ⊙ (up · x))`` of ``x [..., C]``, of these neurons.

        Where the kernel refuses, after a `SlowPath` warning, their rows are copied at every call.
        """
        try:
            return fused.ffn(x, *self, act)
        except fused.Refused as refused:
            warnings.warn(
                f"{refused} The gathered reference stands in, which copies gate and up for every token.",
                SlowPath,
                stacklevel=2,
            )
        return self.plain(x, act)

    def plain(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """The same by torch alone."""
        gate, up = (functional.linear(x, each.index_select(0, self.neurons)) for each in (self.gate, self.up))
        return functional.linear(act(gate) * up, self.down[:, : len(self.neurons)])

    @property
    def bytes(self) -> int:
        """Held beside the weights."""
        return self.down.nbytes + self.neurons.nbytes


def gathered(gate: Matrix, up: Matrix, down: Matrix, neurons: Tensor) -> GatheredFFN:
    """``gate, up [D, C]`` as they are, and what ``neurons``, int64 ``[K]``, have in ``down [C, D]``.

    Raises `ValueError` for int8.
    """
    if isinstance(gate, Int8Matrix) or isinstance(up, Int8Matrix) or isinstance(down, Int8Matrix):
        raise ValueError("the gathered FFN reads floats, and these weights are int8")
    k = len(neurons)
    # Padded with any column, which is then cleared: one pass over down, and no second copy.
    columns = down.index_select(1, functional.pad(neurons, (0, padded(k) - k)))
    columns[:, k:] = 0
    return GatheredFFN(gate, up, columns, neurons.int())


def padded(neurons: int) -> int:
    """Columns that are kept of so many."""
    return -(-neurons // fused.PADDED) * fused.PADDED
