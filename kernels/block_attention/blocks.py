"""Block attention that computes only the pairs the plan allows: dense calls joined by log-sum-exp, no mask, no copied sink.

Every region is one or two dense attention calls: itself (causal) and what it sees before itself (not causal). All blocks of
one size go through one batched call, and the queries of all blocks read the sink in a single one, so that its keys are
never repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.dense import attend, join
from vlmbench.kernels.block_attention.plan import Plan


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``.

    Raises `ValueError` when N is not the plan's length or the batch is not one.
    """
    if q.shape[2] != plan.length or k.shape[2] != plan.length:
        raise ValueError(f"the plan is for {plan.length} tokens; q has {q.shape[2]} and k has {k.shape[2]}")
    if q.shape[0] != 1:
        raise ValueError(f"a plan is of one prompt; the batch is {q.shape[0]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    before, tail = slice(0, plan.tail), slice(plan.tail, plan.length)
    own = attend(q[:, :, tail], k[:, :, tail], v[:, :, tail], causal=True, scale=scale)
    if plan.tail:
        own = join(*own, *attend(q[:, :, tail], k[:, :, before], v[:, :, before], causal=False, scale=scale))
    return torch.cat([before_tail(q, k, v, plan, scale), own[0]], dim=2)


def before_tail(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """Sink and blocks alone: ``[1, H, tail, D]``."""
    out = q.new_empty(*q.shape[:2], plan.tail, q.shape[3])
    if plan.sink:
        sink = slice(0, plan.sink)
        out[:, :, sink], _ = attend(q[:, :, sink], k[:, :, sink], v[:, :, sink], causal=True, scale=scale)
    if plan.blocks:
        out[:, :, plan.sink :] = _within_blocks(q, k, v, plan, scale)
    return out


def _within_blocks(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """What the blocks' queries see, themselves and the sink: ``[1, H, tail - sink, D]``."""
    parts = []
    for start, stop, size in _runs(plan):
        shape = (-1, size)
        rows = [
            x[0, :, start:stop].unflatten(1, shape).transpose(0, 1) for x in (q, k, v)
        ]  # [blocks, H, size, D], views
        out, lse = attend(*rows, causal=True, scale=scale)
        parts.append((out.transpose(0, 1).flatten(1, 2)[None], lse.transpose(0, 1).flatten(1, 2)[None]))
    own, own_lse = (
        parts[0] if len(parts) == 1 else (torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2))
    )
    if plan.sink:
        sink, middle = slice(0, plan.sink), slice(plan.sink, plan.tail)
        seen = attend(q[:, :, middle], k[:, :, sink], v[:, :, sink], causal=False, scale=scale)
        own, _ = join(own, own_lse, *seen)
    return own


def _runs(plan: Plan) -> list[tuple[int, int, int]]:
    """(start, stop, size) of every stretch of adjoining blocks of one size."""
    found: list[tuple[int, int, int]] = []
    for start, stop in plan.blocks:
        size = stop - start
        if found and found[-1][2] == size:
            found[-1] = (found[-1][0], stop, size)
        else:
            found.append((start, stop, size))
    return found
