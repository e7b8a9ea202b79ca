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
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for first, stop in ((0, min(local, bottom)), (bottom, n)):  # all that is before them
        if first < stop:
            found = causal_rows(q, k, v, first, stop, scale=scale, tally=tally)
            out[:, :, first:stop], lse[:, :, first:stop] = found
    if bottom > local:
        band = Attended(out[:, :, local:bottom], lse[:, :, local:bottom])
        for b in range(len(q)):
            _windows(Attended(band.out[b], band.lse[b]), q[b], k[b], v[b], local, bottom, scale, tally)
        _add_sink(band, q, k, v, sink, local, bottom, scale, tally)
    return Attended(out, lse)


def _windows(
    into: Attended, q: Tensor, k: Tensor, v: Tensor, local: int, bottom: int, scale: float, tally: Tally
) -> None:
    """Rows ``[local, bottom)`` of ``[H, N, D]`` over the `local` keys that end with their own."""
    rows, (out, lse) = bottom - local, into
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


def _sliding(x: Tensor, first: int, count: int, step: int, width: int) -> Tensor:
    """``[count, H, width, D]``: windows of ``x [H, N, D]`` that begin at `first` and lie `step` apart, a view."""
    heads, rows, dims = x.stride()
    shape = (count, x.shape[0], width, x.shape[2])
    return x.as_strided(shape, (step * rows, heads, rows, dims), x.storage_offset() + first * rows)


def _add_sink(
    band: Attended, q: Tensor, k: Tensor, v: Tensor, sink: int, local: int, bottom: int, scale: float, tally: Tally
) -> None:
    """Join the sink's keys that are before the window: all of them, once the window has left them behind."""
    out, lse = band
    sink = min(sink, bottom - local)
    if sink == 0:
        return
    stairs = torch.ones(sink, sink, dtype=torch.bool, device=q.device).tril()
    for first, stop, mask in ((local, local + sink, stairs), (local + sink, bottom, None)):
        if first == stop:
            continue
        far = attend(q[:, :, first:stop], k[:, :, :sink], v[:, :, :sink], scale=scale, tally=tally, mask=mask)
        there = slice(first - local, stop - local)
        lse[:, :, there] = join_into(out[:, :, there], (out[:, :, there], lse[:, :, there]), far)
