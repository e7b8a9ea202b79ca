"""Attention in which blocks of a prompt see a shared sink and themselves, and the tail sees everything."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.block_attention import blocks, reference
from vlmbench.kernels.block_attention.plan import Plan, make_plan

__all__ = ["Plan", "block_attention", "is_fast", "make_plan"]


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``.

    The fast path where there is one for the device, else the masked reference, which costs as much as dense attention.
    """
    op = blocks if is_fast(q.device) else reference
    return op.block_attention(q, k, v, plan, scale=scale)


def is_fast(device: torch.device) -> bool:
    """Whether this device computes only the pairs that the plan allows."""
    return device.type == "cpu"
