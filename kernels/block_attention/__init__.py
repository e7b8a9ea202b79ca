"""Attention in which blocks of a prompt see a shared sink and themselves, and the tail sees everything."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.block_attention import blocks, fused, reference
from vlmbench.kernels.block_attention.plan import Plan, make_plan
from vlmbench.kernels.block_attention.remembered import forget

__all__ = ["Attended", "Plan", "SlowPath", "attend", "block_attention", "forget", "is_fast", "make_plan", "runs_fast"]


class SlowPath(UserWarning):
    """Attention went the masked way, at the dense cost. Filter it as an error to be refused instead."""


class Attended(NamedTuple):
    """An output, and the way it was computed: some refusals are known only when the kernel is launched."""

    out: Tensor
    """``[1, H, N, D]``"""
    masked: bool
    """Whether the masked reference stood in, at the dense cost."""


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``.

    The fast path where there is one for the device and shape; else, after a `SlowPath` warning, the masked reference.
    """
    return attend(q, k, v, plan, scale=scale).out


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Attended:
    """The same, and whether the masked reference computed it."""
    if q.device.type == "cpu":
        return Attended(blocks.block_attention(q, k, v, plan, scale=scale), masked=False)
    try:
        return Attended(fused.block_attention(q, k, v, plan, scale=scale), masked=False)
    except fused.Refused as refused:
        warnings.warn(f"{refused} The masked reference stands in, as slow as dense attention.", SlowPath, stacklevel=1)
    return Attended(reference.block_attention(q, k, v, plan, scale=scale), masked=True)


def is_fast(device: torch.device) -> bool:
    """Whether this device computes only the pairs that the plan allows, for tensors that its kernel takes."""
    return device.type == "cpu" or fused.no_kernel(device) is None


def runs_fast(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `block_attention` should compute only the pairs that the plan allows, for these tensors.

    As far as that is known before the kernel is launched; what it did then is in `Attended.masked`.
    """
    return q.device.type == "cpu" or fused.refusal(q, k, v) is None
