"""Dense attention that also hands out its log-sum-exp, which is what lets attention over two key sets be joined."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """``q [B, H, n, D]``, ``k, v [B, Hkv, m, D]`` with H a multiple of Hkv: output ``[B, H, n, D]``, log-sum-exp ``[B, H, n]``.

    `causal` needs n = m. Keys stay at their own number of heads: head g of every group goes through in one call.
    """
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return _attend(q, k, v, causal, scale)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for g in range(groups):
        out[:, g::groups], lse[:, g::groups] = _attend(q[:, g::groups], k, v, causal, scale)
    return out, lse


def join(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over both key sets, and its log-sum-exp, from attention over each."""
    out = torch.lerp(b, a, torch.sigmoid(a_lse - b_lse)[..., None].to(a.dtype))
    return out, torch.logaddexp(a_lse, b_lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu" and q.dtype != torch.float16:
        # The kernel behind SDPA on the CPU, by its own name: SDPA does not hand out the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse.float()
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse
