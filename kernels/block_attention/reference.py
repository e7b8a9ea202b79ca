"""The meaning of block attention: dense attention under the plan's boolean mask. Exact, and O(N²) in time and memory."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vlmbench.kernels.block_attention.plan import Plan


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]`` with H a multiple of Hkv; returns ``[B, H, N, D]``.

    Raises `ValueError` when N is not the plan's length.
    """
    if q.shape[2] != plan.length or k.shape[2] != plan.length:
        raise ValueError(f"the plan is for {plan.length} tokens; q has {q.shape[2]} and k has {k.shape[2]}")
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=plan.allow.to(q.device), scale=scale)
