"""Dense attention that also hands out its log-sum-exp, and joining attention over two key sets by it.

With outputs a, b and log-sum-exps la, lb over disjoint keys, attention over both is b + σ(la − lb) · (a − b), and its
log-sum-exp is log(exp la + exp lb).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CAUSAL_LEAF = 256
"""A causal call of the CPU kernel computes whole tiles of up to 512 keys: below this size halving it no longer pays."""


class Attended(NamedTuple):
    out: Tensor
    """``[B, H, n, D]``"""
    lse: Tensor
    """``[B, H, n]``, float32."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Attended:
    """``q [B, H, n, D]``, ``k, v [B, H, m, D]``; `causal` needs n = m."""
    if q.device.type == "cpu" and q.dtype != torch.float16:
        # The kernel behind SDPA on the CPU, by its own name: SDPA does not hand out the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return Attended(out, lse.float())
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    lse = scores.logsumexp(-1)
    return Attended((scores - lse[..., None]).exp().to(v.dtype) @ v, lse)


def causal_blocks(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Attended:
    """Causal attention of many blocks, all ``[B, H, n, D]``, without computing the upper half of their squares.

    A block is its two halves, each causal and both in one batch, and the lower half looking at the upper one.
    """
    n = q.shape[2]
    if n < 2 * CAUSAL_LEAF or n % 2:
        return attend(q, k, v, causal=True, scale=scale)
    out, lse = causal_blocks(*(_halves(x) for x in (q, k, v)), scale=scale)
    (upper_k, upper_v), lower_q = (x[:, :, : n // 2] for x in (k, v)), q[:, :, n // 2 :]
    seen = attend(lower_q, upper_k, upper_v, causal=False, scale=scale)
    whole = q.new_empty(*q.shape[:2], 2, n // 2, q.shape[3])
    whole_lse = lse.new_empty(*q.shape[:2], 2, n // 2)
    for half in (0, 1):
        whole_lse[:, :, half] = lse[half::2]
    whole[:, :, 0] = out[0::2]
    whole_lse[:, :, 1] = join_into(whole[:, :, 1], Attended(out[1::2], lse[1::2]), seen)
    return Attended(whole.flatten(2, 3), whole_lse.flatten(2, 3))


def join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Attended:
    """Attention over both key sets from attention over each."""
    out = torch.empty_like(a[0])
    return Attended(out, join_into(out, a, b))


def join_into(out: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Write the joined output to `out`; returns the joined log-sum-exp."""
    torch.lerp(b[0], a[0], torch.sigmoid(a[1] - b[1])[..., None].to(out.dtype), out=out)
    return torch.logaddexp(a[1], b[1])


def _halves(x: Tensor) -> Tensor:
    """``[B, H, n, D]`` as ``[2B, H, n/2, D]``: upper half, lower half, of one block after the other. A copy."""
    return x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
