"""A linear layer whose weights are kept as int8 with one scale an output, and used as floats (weight-only quantisation).

Written here and not taken from torchao, which does the same: as measured on this project's CPUs its eager path turns the
weights into floats at every call where torch has a kernel that need not; its tensor subclass hides from the memory meter how
many bytes there are; and CoreMatching has to copy single rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST = 127
"""Largest absolute value: symmetric, so that zero stays zero."""
FEW = 16
"""Rows of x up to which torch's kernel is the faster way; above it, it has no blocks to reuse weights in."""
VECTOR = 32
"""Entries; the widest that the kernel's variants step by is 16."""


class Int8Matrix(NamedTuple):
    """``W [N, K]`` as ``scale · values``."""

    values: Tensor
    """int8 ``[N, K]``"""
    scale: Tensor
    """``[N]``, in the dtype of W: the largest absolute value of a row is `MOST` of it."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x Wᵀ`` of ``x [..., K]``."""
        if has_kernel(x.device, x.dtype, x.shape[-1]) and x.numel() <= FEW * x.shape[-1]:
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            return torch._weight_int8pack_mm(flat, self.values, self.scale).view(*x.shape[:-1], -1)
        return functional.linear(x, self.values.to(x.dtype)) * self.scale

    def rows(self, indices: Tensor) -> Int8Matrix:
        """A copy of some outputs, int64 ``[n]``."""
        return Int8Matrix(self.values.index_select(0, indices), self.scale.index_select(0, indices))

    def columns(self, indices: Tensor) -> Int8Matrix:
        """A copy for some inputs, int64 ``[n]``; the scales stay those of the whole rows."""
        return Int8Matrix(self.values.index_select(1, indices), self.scale)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


class Int8Linear(nn.Module):
    """Stands in for an ``nn.Linear``; the bias stays the layer's own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        found = quantise(linear.weight.detach())
        self.values: Tensor
        self.scale: Tensor
        self.register_buffer("values", found.values)
        self.register_buffer("scale", found.scale)
        self.bias = linear.bias

    @property
    def matrix(self) -> Int8Matrix:
        return Int8Matrix(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        out = self.matrix(x)
        return out if self.bias is None else out + self.bias


def quantise(weight: Tensor) -> Int8Matrix:
    """The nearest int8 of ``weight [N, K]``: no entry moves by more than half its row's scale.

    Worked out in float32: steps up to 127 have no halves in bfloat16. In float16 the scale itself must not underflow for this
    to hold (rows whose largest entry is above 0.008).
    """
    wide = weight.float()
    scale = (wide.abs().amax(1) / MOST).to(weight.dtype)
    steps = wide / torch.where(scale > 0, scale, 1).float()[:, None]  # a row of zeros stays one
    return Int8Matrix(steps.round().clamp(-MOST, MOST).to(torch.int8).contiguous(), scale)


def has_kernel(device: torch.device, dtype: torch.dtype, inputs: int) -> bool:
    """Whether few tokens of `inputs` entries can be multiplied without writing the weights out as floats first.

    torch's ``_weight_int8pack_mm`` takes other dtypes on a CPU too, by a loop that is slower than that by orders of magnitude.
    It reads beyond the end where `inputs` is no multiple of its vectors, without a word (torch 2.15), and is not called then.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and inputs % VECTOR == 0
