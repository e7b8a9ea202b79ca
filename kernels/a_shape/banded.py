"""A-shape attention that computes only its pairs: windows are overlapping views of the keys, one masked call for all rows.

Rows below `local` see all that is before them. Every later block of `BLOCK` rows sees the ``local + BLOCK - 1`` keys that
end with its last row, under one staircase mask that all blocks share; the sink is a second call, joined by log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.calls import Attended, Tally, attend, causal_rows, join_into

BLOCK = 64
"""Rows that share a window: fewer make small products, more compute more of the mask's corners."""


def a_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: int,
    local: int,
    tail: int = 0,
    scale: float | None = None,
    tally: Tally | None = None,
) -> Attended:
    """``q, k, v [B, H, N, D]`` (as many heads each); returns ``[B, H, N, D]`` and its log-sum-exp ``[B, H, N]``.

    The last `tail` rows see every key (Tri-shape). Raises `ValueError` when `local` is below 1: a query sees itself.
    """
    if local < 1 or sink < 0 or tail < 0:
        raise ValueError(f"local must be at least 1 and sink and tail at least 0, not {local}, {sink} and {tail}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tally = tally if tally is not None else Tally()
    n = q.shape[2]
    bottom = max(0, n - tail)
    parts = []
    if head := min(local, bottom):
        parts.append(causal_rows(q, k, v, 0, head, scale=scale, tally=tally))
    if bottom > local:
        found = [_windows(q[b], k[b], v[b], local, bottom, scale, tally) for b in range(len(q))]
        band = Attended(torch.stack([each.out for each in found]), torch.stack([each.lse for each in found]))
        parts.append(_with_sink(band, q, k, v, sink, local, bottom, scale, tally))
    if bottom < n:
        parts.append(causal_rows(q, k, v, bottom, n, scale=scale, tally=tally))
    if len(parts) == 1:
        return parts[0]
    return Attended(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))


def _windows(q: Tensor, k: Tensor, v: Tensor, local: int, bottom: int, scale: float, tally: Tally) -> Attended:
    """Rows ``[local, bottom)`` of ``[H, N, D]`` over the `local` keys that end with their own."""
    rows = bottom - local
    out, lse = q.new_empty(q.shape[0], rows, q.shape[2]), q.new_empty(q.shape[0], rows, dtype=torch.float32)
    full = rows - rows % BLOCK
    for first, stop, block in ((0, full, BLOCK), (full, rows, rows - full)):
        if first == stop:
            continue
        count, width = (stop - first) // block, local + block - 1
        a, c = torch.arange(block, device=q.device)[:, None], torch.arange(width, device=q.device)
        mask = (c >= a) & (c < a + local)
        seen = [_sliding(x, first + 1, count, block, width) for x in (k, v)]
        blocks = q[:, local + first : local + stop].unflatten(1, (count, block)).transpose(0, 1)
        found = attend(blocks, *seen, scale=scale, tally=tally, mask=mask)  # [count, H, block, D]
        out[:, first:stop].unflatten(1, (count, block)).copy_(found.out.transpose(0, 1))
        lse[:, first:stop].unflatten(1, (count, block)).copy_(found.lse.transpose(0, 1))
    return Attended(out, lse)


def _sliding(x: Tensor, first: int, count: int, step: int, width: int) -> Tensor:
    """``[count, H, width, D]``: windows of ``x [H, N, D]`` that begin at `first` and lie `step` apart, a view."""
    heads, rows, dims = x.stride()
    shape = (count, x.shape[0], width, x.shape[2])
    return x.as_strided(shape, (step * rows, heads, rows, dims), x.storage_offset() + first * rows)


def _with_sink(
    band: Attended, q: Tensor, k: Tensor, v: Tensor, sink: int, local: int, bottom: int, scale: float, tally: Tally
) -> Attended:
    """Join the sink's keys that are before the window: all of them, once the window has left them behind."""
    out, lse = band
    sink = min(sink, bottom - local)
    if sink == 0:
        return band
    stairs = torch.ones(sink, sink, dtype=torch.bool, device=q.device).tril()
    for first, stop, mask in ((local, local + sink, stairs), (local + sink, bottom, None)):
        if first == stop:
            continue
        far = attend(q[:, :, first:stop], k[:, :, :sink], v[:, :, :sink], scale=scale, tally=tally, mask=mask)
        there = slice(first - local, stop - local)
        lse[:, :, there] = join_into(out[:, :, there], (out[:, :, there], lse[:, :, there]), far)
    return Attended(out, lse)
