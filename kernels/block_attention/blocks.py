"""Block attention that computes only the pairs the plan allows: dense calls joined by log-sum-exp, no mask, no copied sink.

Every region is one or two dense attention calls: itself (causal) and what it sees before itself (not causal). Two results
o1, o2 with log-sum-exps l1, l2 over disjoint keys join as o2 + σ(l1 − l2) · (o1 − o2). All blocks of one size go through one
batched call, and the queries of all blocks read the sink in a single one, so that its keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.plan import Plan

Attend = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""``(q [B,H,n,D], k [B,H,m,D], v, causal, scale) -> (out [B,H,n,D], log-sum-exp [B,H,n])``."""


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``.

    Raises `ValueError` when N is not the plan's length, the batch is not one, or the device has no dense attention that
    returns its log-sum-exp.
    """
    if q.shape[2] != plan.length or k.shape[2] != plan.length:
        raise ValueError(f"the plan is for {plan.length} tokens; q has {q.shape[2]} and k has {k.shape[2]}")
    if q.shape[0] != 1:
        raise ValueError(f"a plan is of one prompt; the batch is {q.shape[0]}")
    attend = _attend(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    # Head g of every group reads the same keys: going through the groups keeps keys at Hkv heads instead of repeating them.
    for g in range(groups):
        _one_head_each(q[:, g::groups], k, v, plan, scale, attend, out[:, g::groups])
    return out


def _one_head_each(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, attend: Attend, out: Tensor) -> None:
    """The same for H = Hkv, into `out`."""
    sink, tail = slice(0, plan.sink), slice(plan.tail, plan.length)
    if plan.sink:
        out[:, :, sink] = attend(q[:, :, sink], k[:, :, sink], v[:, :, sink], True, scale)[0]
    blocks = slice(plan.sink, plan.tail)
    own, own_lse = _within_blocks(q, k, v, plan, scale, attend)
    if plan.sink and plan.blocks:
        seen, seen_lse = attend(q[:, :, blocks], k[:, :, sink], v[:, :, sink], False, scale)
        own = _join(own, own_lse, seen, seen_lse)
    out[:, :, blocks] = own
    before = slice(0, plan.tail)
    own, own_lse = attend(q[:, :, tail], k[:, :, tail], v[:, :, tail], True, scale)
    if plan.tail:
        seen, seen_lse = attend(q[:, :, tail], k[:, :, before], v[:, :, before], False, scale)
        own = _join(own, own_lse, seen, seen_lse)
    out[:, :, tail] = own


def _within_blocks(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, attend: Attend) -> tuple[Tensor, Tensor]:
    """Causal attention inside every block: ``[1, H, tail - sink, D]`` and its log-sum-exp."""
    shape = (*q.shape[:2], plan.tail - plan.sink)
    out, lse = q.new_empty(*shape, q.shape[3]), q.new_empty(*shape, dtype=torch.float32)
    for start, stop, size in _runs(plan):

        def rows(x: Tensor, start: int = start, stop: int = stop, size: int = size) -> Tensor:
            return x[0, :, start:stop].unflatten(1, (-1, size)).transpose(0, 1)  # [blocks, H, size, D], a view

        one, one_lse = attend(rows(q), rows(k), rows(v), True, scale)
        there = slice(start - plan.sink, stop - plan.sink)
        out[0, :, there] = one.transpose(0, 1).flatten(1, 2)
        lse[0, :, there] = one_lse.transpose(0, 1).flatten(1, 2)
    return out, lse


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


def _join(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """Attention over the keys of both, from attention over the keys of each."""
    return torch.lerp(b, a, torch.sigmoid(a_lse - b_lse)[..., None].to(a.dtype))


def _attend(device: torch.device) -> Attend:
    if device.type == "cpu":
        return _cpu
    raise ValueError(f"no dense attention with a log-sum-exp is known for {device.type}; use the reference")


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel behind SDPA on the CPU, called by its own name because SDPA does not hand out the log-sum-exp."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse
