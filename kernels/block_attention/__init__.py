"""Attention in which blocks of a prompt see a shared sink and themselves, and the tail sees everything."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from vlmbench.kernels.block_attention import blocks, fused, reference
from vlmbench.kernels.block_attention.plan import Plan, make_plan

__all__ = ["Plan", "SlowPath", "block_attention", "is_fast", "make_plan", "runs_fast"]


class SlowPath(UserWarning):
    """Attention went the masked way, at the dense cost. Filter it as an error to be refused instead."""


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``.

    The fast path where there is one for the device and shape; else, after a `SlowPath` warning, the masked reference.
    """
    if q.device.type == "cpu":
        return blocks.block_attention(q, k, v, plan, scale=scale)
    try:
        return fused.block_attention(q, k, v, plan, scale=scale)
    except fused.Refused as refused:
        warnings.warn(f"{refused} The masked reference stands in, as slow as dense attention.", SlowPath, stacklevel=1)
    return reference.block_attention(q, k, v, plan, scale=scale)


def is_fast(device: torch.device) -> bool:
    """Whether this device computes only the pairs that the plan allows, for tensors that its kernel takes."""
    return device.type == "cpu" or fused.no_kernel(device) is None


def runs_fast(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `block_attention` computes only the pairs that the plan allows, for these tensors."""
    return q.device.type == "cpu" or fused.refusal(q, k, v) is None
