"""What an index is made from, written out: the last queries' attention summed along columns and along diagonals."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class Sums(NamedTuple):
    """Of softmax rows of the last L queries, where row l is query N - L + l."""

    columns: Tensor
    """``[B, H, N]``: what each key gets from all of them."""
    diagonals: Tensor
    """``[B, H, N]``: what keys at offset o = i - j get, from 0 on."""


def sums(weights: Tensor) -> Sums:
    """Of `weights` ``[B, H, L, N]``."""
    return Sums(weights.sum(-2), diagonal_sums(weights))


def diagonal_sums(weights: Tensor) -> Tensor:
    """``[..., L, N]`` summed along each diagonal, ``[..., N]``: offset o = i - j from 0 on, where row l is query N - L + l."""
    length, n = weights.shape[-2:]
    # Rows of N + L entries read as rows of N + L + 1: each begins one entry later, and diagonals become columns.
    line = functional.pad(functional.pad(weights, (length, 0)).flatten(-2), (0, length))
    sums = line.unflatten(-1, (length, n + length + 1)).sum(-2)  # column N - o
    return sums[..., 1 : n + 1].flip(-1)
