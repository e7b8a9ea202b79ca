"""Block attention that computes only the pairs the plan allows: dense calls joined by log-sum-exp, no mask, no copied sink.

Every region is one or two dense attention calls: itself (causal) and what it sees before itself (not causal). All blocks of
one size go through one batched call, and their queries read the sink in a single one, so that its keys are never repeated.
Results are joined straight into the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.dense import attend, causal_blocks, join_into
from vlmbench.kernels.block_attention.plan import Plan


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``.

    Raises `ValueError` when N is not the plan's length or the batch is not one.
    """
    if q.shape[2] != plan.length or k.shape[2] != plan.length:
        raise ValueError(f"the plan is for {plan.length} tokens; q has {q.shape[2]} and k has {k.shape[2]}")
    out = before_tail(q, k, v, plan, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tail, before = slice(plan.tail, plan.length), slice(0, plan.tail)
    groups = q.shape[1] // k.shape[1]
    for g in range(groups):
        rows, into = q[:, g::groups, tail], out[:, g::groups, tail]
        own = attend(rows, k[:, :, tail], v[:, :, tail], causal=True, scale=scale)
        if plan.tail:
            join_into(into, own, attend(rows, k[:, :, before], v[:, :, before], causal=False, scale=scale))
        else:
            into.copy_(own[0])
    return out


def before_tail(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """The same with the tail's rows left unwritten. Raises `ValueError` when the batch is not one."""
    if q.shape[0] != 1:
        raise ValueError(f"a plan is of one prompt; the batch is {q.shape[0]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # As attention outputs lie in memory, heads behind tokens: the caller's transpose back is then free.
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    sink = slice(0, plan.sink)
    for g in range(groups):  # head g of every group: keys stay at their own number of heads
        one, into = q[:, g::groups], out[:, g::groups]
        if plan.sink:
            into[:, :, sink].copy_(attend(one[:, :, sink], k[:, :, sink], v[:, :, sink], causal=True, scale=scale)[0])
        for start, stop, size in _runs(plan):
            there = slice(start, stop)
            rows = [_blocks(x[:, :, there], size) for x in (one, k, v, into)]
            own = causal_blocks(*rows[:3], scale=scale)
            if plan.sink:
                seen, lse = attend(one[:, :, there], k[:, :, sink], v[:, :, sink], causal=False, scale=scale)
                join_into(rows[3], own, (_blocks(seen, size), _blocks(lse[..., None], size)[..., 0]))
            else:
                rows[3].copy_(own[0])
    return out


def _blocks(x: Tensor, size: int) -> Tensor:
    """``[1, H, blocks · size, D]`` as ``[blocks, H, size, D]``, a view."""
    return x[0].unflatten(1, (-1, size)).transpose(0, 1)


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
