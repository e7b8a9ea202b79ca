"""Attention of a query that weighs its parallel-encoded context apart: temperature inside, a scale on its log-sum-exp.

Adaptive Parallel Encoding (arXiv 2502.05431): contexts encoded apart get too much attention as a whole, and too flat. With
temperature T and scale s, the context's scores are divided by T, and its log-sum-exp counts s · T times when the context is
joined with everything else. T = s = 1 is plain attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.dense import attend, join, join_into


def adaptive_attention(
    q: Tensor, k: Tensor, v: Tensor, context: tuple[int, int], *, temperature: float, scale: float, scaling: float
) -> Tensor:
    """``q [1, H, n, D]``: the last n of the m tokens of ``k, v [1, Hkv, m, D]``, all of them behind the context.

    `context` is ``[start, stop)`` in the keys, `scaling` the usual softmax scale. Returns ``[1, H, n, D]``.
    """
    start, stop = context
    n, m = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    joined = torch.empty_like(q)
    for g in range(groups):  # head g of every group: keys stay at their own number of heads
        rows = q[:, g::groups]
        own = attend(rows, k[:, :, m - n :], v[:, :, m - n :], causal=True, scale=scaling)
        for before in (slice(0, start), slice(stop, m - n)):
            if before.stop > before.start:
                own = join(own, attend(rows, k[:, :, before], v[:, :, before], causal=False, scale=scaling))
        out, lse = attend(rows, k[:, :, start:stop], v[:, :, start:stop], causal=False, scale=scaling / temperature)
        join_into(joined[:, g::groups], own, (out, lse * (scale * temperature)))
    return joined
