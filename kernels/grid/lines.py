"""Grid attention that computes only its pairs, by address arithmetic: no token is moved, no N × N mask is made.

A head's vertical lines are gathered once, a few hundred keys, and stand in the same row of scores as sink and window: one
softmax over all three. Horizontal lines are computed whole, some at a time, in place of what their rows had. Sorted by
residue (i mod stride), "keys of my residue that are at least `local` before me" is plain causal attention, so diagonals are
one batched causal call on strided views, joined by log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmbench.kernels.a_shape.banded import Singles, band
from vlmbench.kernels.calls import Attended, Tally, attend, join_into, native, take
from vlmbench.kernels.calls.tiles import Buffer, fit_rows, softmaxed
from vlmbench.kernels.grid.reference import Grid

ROWS = 128
"""Rows of a matrix of horizontal lines, those of all heads that share keys; more compute more of a mask's corner."""


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    phase: Tensor,
    *,
    scale: float | None = None,
    tally: Tally | None = None,
) -> Attended:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``, `phase` int64 ``[B, H]``; returns ``[B, H, N, D]`` and ``[B, H, N]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tally = tally if tally is not None else Tally()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    n = q.shape[2]
    start, stop = min(grid.start, n), min(grid.stop, n)
    for b in range(len(q)):
        lines = _Lines(
            q[b], k[b], v[b], Attended(out[b], lse[b]), grid, phase[b] % grid.stride, start, stop, scale, tally
        )
        lines.window()
        if grid.slash:
            lines.slash()
        if grid.horizontal:
            lines.horizontal()
    return Attended(out, lse)


class _Lines:
    """The attention of one prompt, ``q [H, N, D]`` and ``k, v [Hkv, N, D]``."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        into: Attended,
        grid: Grid,
        phase: Tensor,
        start: int,
        stop: int,
        scale: float,
        tally: Tally,
    ) -> None:
        self.q, self.k, self.v, self.grid = q, k, v, grid
        self.out, self.lse = into
        self.phase, self.start, self.stop, self.scale, self.tally = phase, start, stop, scale, tally
        self.wanted, self.scores, self.found = Buffer(q), Buffer(q), Buffer(q)

    def window(self) -> None:
        """Sink, window and vertical lines: keys ``start + phase + t · stride`` for the rows at least `local` behind them."""
        grid, singles = self.grid, None
        first = self.start + self.phase  # [H]
        count = -(-(self.stop - grid.local - int(first.min())) // grid.stride)
        if grid.vertical and count > 0:
            at = first[:, None] + torch.arange(count, device=first.device) * grid.stride  # [H, c]
            held = at.clamp(max=self.stop - 1)  # no row is `local` behind what is beyond
            singles = Singles(at, *(self._take(x, held) for x in (self.k, self.v)))
        tail = self.q.shape[1] - max(self.start, self.stop)
        into = Attended(self.out, self.lse)
        options: dict[str, Any] = {"sink": grid.sink, "local": grid.local, "tail": tail, "singles": singles}
        band(into, self.q, self.k, self.v, scale=self.scale, tally=self.tally, **options)

    def slash(self) -> None:
        """Keys in the row's own residue, at least `local` before it."""
        stride, span = self.grid.stride, self.stop - self.start
        keys, values = (x.repeat_interleave(len(self.q) // len(x), 0) for x in (self.k, self.v))
        skip, periods = -(-self.grid.local // stride), span // stride
        rest = span - periods * stride
        if periods > skip:
            rows = self._residues(self.q, skip, periods, stride)  # [stride, H, periods - skip, D]
            k, v = (self._residues(x, 0, periods - skip, stride) for x in (keys, values))
            found = attend(rows, k, v, scale=self.scale, tally=self.tally, causal=True)
            out, lse = found.out.permute(1, 2, 0, 3).flatten(1, 2), found.lse.permute(1, 2, 0).flatten(1)
            first = self.start + skip * stride
            self._join(slice(first, first + lse.shape[1]), self._apart(first, Attended(out, lse)))
        if rest and periods >= skip:  # the last, partial period: one row for each residue that it has
            first = self.start + periods * stride
            rows = self.q[:, first : self.stop].transpose(0, 1)[:, :, None]  # [rest, H, 1, D]
            k, v = (self._residues(x, 0, periods - skip + 1, rest) for x in (keys, values))
            found = attend(rows, k, v, scale=self.scale, tally=self.tally)
            out, lse = found.out[:, :, 0].transpose(0, 1), found.lse[:, :, 0].T
            self._join(slice(first, self.stop), self._apart(first, Attended(out, lse)))

    def horizontal(self) -> None:
        """Rows ``start + phase + t · stride`` over every key before them, in place of what they had."""
        stride, shared = self.grid.stride, len(self.q) // len(self.k)
        lines = max(0, -(-(self.stop - self.start - int(self.phase.min())) // stride))
        step = torch.arange(lines, device=self.q.device) * stride
        self.tally.written |= not (native(self.q) or self.tally.dry)
        first = 0
        while first < lines:
            most = min(lines - first, -(-ROWS // shared))
            stop = first + fit_rows(len(self.q), self.start + (first + most) * stride, most)
            far, near = self.start + first * stride, min(self.start + stop * stride, self.stop)
            self._whole(self.start + self.phase[:, None] + step[first:stop], far, near)
            first = stop

    def _whole(self, rows: Tensor, far: int, near: int) -> None:
        """The rows ``[H, c]`` that lie in ``[far, near)``, or behind `stop`, where there is nothing to do."""
        heads, count = rows.shape
        at = rows.clamp(max=self.stop - 1)
        self.tally.computed += heads * count * near
        self.tally.pairs += int((at + 1).sum())
        if self.tally.dry:
            return
        asked = self.wanted(len(self.k), heads // len(self.k) * count, self.q.shape[2])
        number = torch.arange(heads, device=at.device)[:, None]
        own = self.q[number, at]  # `take` would copy all of a view of some heads
        torch.mul(own.to(asked.dtype), self.scale, out=asked.view(heads, count, -1))
        keys, values = (x[:, :near].to(asked.dtype) for x in (self.k, self.v))
        unseen = torch.arange(far, near, device=at.device) > at[..., None]  # [H, c, near - far]

        def scores() -> Tensor:
            into = self.scores(*asked.shape[:2], near)
            torch.bmm(asked, keys.transpose(1, 2), out=into)
            into.view(heads, count, near)[:, :, far:].masked_fill_(unseen, float("-inf"))
            return into

        weights, lse = softmaxed(
            scores, lambda scores: scores.view(heads, count, near).gather(2, at[..., None])[..., 0]
        )
        found = torch.bmm(weights, values, out=self.found(*asked.shape)).view(heads, count, -1)
        head, line = (rows < self.stop).nonzero(as_tuple=True)
        where = at[head, line]
        self.out[head, where] = found[head, line].to(self.out.dtype)
        self.lse[head, where] = lse[head, line].float()

    def _take(self, x: Tensor, rows: Tensor) -> Tensor:
        """``x [Hkv, N, D]`` at each head's ``rows [H, c]``: ``[H, c, D]``."""
        return take(x, rows.view(len(x), -1)).view(*rows.shape, x.shape[2])

    def _residues(self, x: Tensor, first: int, stop: int, residues: int) -> Tensor:
        """``[residues, H, stop - first, D]``: periods ``[first, stop)`` of the first so many residues, a view."""
        heads, rows, dims = x.stride()
        stride = self.grid.stride
        shape = (residues, x.shape[0], stop - first, x.shape[2])
        offset = x.storage_offset() + (self.start + first * stride) * rows
        return x.as_strided(shape, (rows, heads, stride * rows, dims), offset)

    def _apart(self, first: int, found: Attended) -> Attended:
        """Without the rows of a vertical line, whose slash is that line: no pair counts twice."""
        if not self.grid.vertical:
            return found
        rows = torch.arange(first, first + found.lse.shape[1], device=self.q.device) - self.start
        same = rows % self.grid.stride == self.phase[:, None]
        return Attended(found.out, found.lse.masked_fill(same, float("-inf")))

    def _join(self, rows: slice, found: Attended) -> None:
        out, lse = self.out[:, rows], self.lse[:, rows]
        lse.copy_(join_into(out, (out, lse), found))
