"""CoreMatching's own yardstick: how far each token moves the last token's attention output along itself (section on theory).

The paper argues that co-activation with core neurons grows with α‖V‖cos; the rank correlation of the two, layer by layer, says
how far that holds on the prompt at hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contribution(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """α_i ‖V_i‖ cos∠(V_i, O) of every key for the last query, float32 ``[n]``; they sum to ‖O‖.

    ``q [H, D]`` is the last token's query, ``k, v [Hkv, n, D]`` what it sees, all after rotation. O is the output of all heads
    side by side before the output projection, and a token's share of it ``α_i V_i`` likewise.
    """
    heads, groups = k.shape[0], q.shape[0] // k.shape[0]
    q, k, v = q.float().view(heads, groups, -1), k.float(), v.float()
    share = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)  # [Hkv, groups, n]
    out = share @ v  # [Hkv, groups, D]
    along = (share * (out @ v.transpose(1, 2))).sum((0, 1))
    return along / out.norm()


def spearman(scores: Tensor, other: Tensor) -> float | None:
    """Rank correlation of two vectors ``[n]``, equal values sharing their mean rank; None when one is constant or n < 2."""
    from scipy.stats import rankdata

    if len(scores) < 2:
        return None
    ranks = [torch.from_numpy(rankdata(each.double().cpu().numpy())) for each in (scores, other)]
    found = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    return None if math.isnan(found) else round(found, 4)
