"""A gated FFN of a few of its neurons: their weights copied once, then ordinary dense products of the smaller size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from vlmbench.kernels.int8_linear import Int8Linear, Int8Matrix

Matrix = Tensor | Int8Matrix
"""``[outputs, inputs]``"""


class CompactFFN(NamedTuple):
    gate: Matrix
    """``[K, C]``"""
    up: Matrix
    """``[K, C]``"""
    down: Matrix
    """``[C, K]``"""

    def __call__(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """``down · (act(gate · x) ⊙ (up · x))`` of ``x [..., C]``."""
        return _times(self.down, act(_times(self.gate, x)) * _times(self.up, x))

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in self)


def compact(gate: Matrix, up: Matrix, down: Matrix, neurons: Tensor) -> CompactFFN:
    """Copies of what ``neurons``, int64 ``[K]``, have in ``gate, up [D, C]`` and ``down [C, D]``."""
    return CompactFFN(_rows(gate, neurons), _rows(up, neurons), _columns(down, neurons))


def matrix_of(module: nn.Module) -> Matrix:
    """The weights of a linear layer, in the form in which they are kept."""
    return module.matrix if isinstance(module, Int8Linear) else module.weight  # type: ignore[return-value]


def _times(matrix: Matrix, x: Tensor) -> Tensor:
    return matrix(x) if isinstance(matrix, Int8Matrix) else functional.linear(x, matrix)


def _rows(matrix: Matrix, indices: Tensor) -> Matrix:
    return matrix.rows(indices) if isinstance(matrix, Int8Matrix) else matrix.index_select(0, indices)


def _columns(matrix: Matrix, indices: Tensor) -> Matrix:
    return matrix.columns(indices) if isinstance(matrix, Int8Matrix) else matrix.index_select(1, indices)
