"""Grid attention that computes only its pairs, by address arithmetic: no token is moved, no N × N mask is made.

Sorted by residue (i mod stride), the rows of a line lie together, and "keys of the line that are at least `local` before
me" is plain causal attention in each residue: row u of residue r sees lines 0 … u. So all residues and heads are one
batched causal call on strided views. A head's own phase only shifts where its residues begin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.a_shape.banded import a_shape
from vlmbench.kernels.calls import Attended, Tally, attend, join_into, take
from vlmbench.kernels.grid.reference import Grid

CHUNK, CHUNK_TOKENS = 32, 256
"""Horizontal lines that share a call, at least, and the tokens that they should span."""


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
    """``q, k, v [B, H, N, D]`` (as many heads each), `phase` int64 ``[B, H]``; returns ``[B, H, N, D]`` and ``[B, H, N]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tally = tally if tally is not None else Tally()
    n = q.shape[2]
    start, stop = min(grid.start, n), min(grid.stop, n)
    out, lse = a_shape(q, k, v, sink=grid.sink, local=grid.local, tail=n - max(start, stop), scale=scale, tally=tally)
    if stop <= start:
        return Attended(out, lse)
    for b in range(len(q)):
        lines = _Lines(q[b], k[b], v[b], out[b], lse[b], grid, phase[b] % grid.stride, start, stop, scale, tally)
        if grid.vertical:
            lines.vertical()
        if grid.slash:
            lines.slash()
        if grid.horizontal:
            lines.horizontal()
    return Attended(out, lse)


class _Lines:
    """Adds lines to the attention of one prompt, ``[H, N, D]``, that holds sink and window already."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grid: Grid,
        phase: Tensor,
        start: int,
        stop: int,
        scale: float,
        tally: Tally,
    ) -> None:
        self.q, self.k, self.v, self.out, self.lse, self.grid = q, k, v, out, lse, grid
        self.phase, self.start, self.stop, self.scale, self.tally = phase, start, stop, scale, tally

    def vertical(self) -> None:
        """Keys ``start + phase + t · stride`` for the rows at least `local` behind them."""
        grid, stride = self.grid, self.grid.stride
        begin = self.start + self.phase + grid.local  # [H]: the first row that sees the head's line 0
        first = int(begin.min())
        if first >= self.stop:
            return
        count = -(-(self.stop - first) // stride)
        step = torch.arange(count * stride, device=self.q.device)
        rows = (begin[:, None] + step).clamp(max=self.stop - 1)  # [H, count · stride]; what is beyond is not read back
        keys = (self.start + self.phase[:, None] + step[::stride]).clamp(max=self.stop - 1)  # [H, count]
        q = take(self.q, rows).unflatten(1, (count, stride)).permute(2, 0, 1, 3)  # [stride, H, count, D]
        k, v = (take(x, keys).expand(stride, -1, -1, -1) for x in (self.k, self.v))
        found = attend(q, k, v, scale=self.scale, tally=self.tally, causal=True)
        back = torch.arange(first, self.stop, device=self.q.device) - begin[:, None]  # [H, rows]
        line, residue = back.clamp(min=0) // stride, back.clamp(min=0) % stride
        heads = torch.arange(len(begin), device=self.q.device)[:, None]
        flat = found.out.transpose(1, 2).reshape(-1, q.shape[3])  # [stride · count · H, D], as the kernel left it
        out = flat.index_select(0, ((residue * count + line) * len(begin) + heads).flatten())
        lse = found.lse[residue, heads, line].masked_fill(back < 0, float("-inf"))
        self._join(slice(first, self.stop), Attended(out.view(*back.shape, -1), lse))

    def slash(self) -> None:
        """Keys in the row's own residue, at least `local` before it."""
        stride, span = self.grid.stride, self.stop - self.start
        skip, periods = -(-self.grid.local // stride), span // stride
        rest = span - periods * stride
        if periods > skip:
            rows = self._residues(self.q, skip, periods, stride)  # [stride, H, periods - skip, D]
            k, v = (self._residues(x, 0, periods - skip, stride) for x in (self.k, self.v))
            found = attend(rows, k, v, scale=self.scale, tally=self.tally, causal=True)
            out, lse = found.out.permute(1, 2, 0, 3).flatten(1, 2), found.lse.permute(1, 2, 0).flatten(1)
            first = self.start + skip * stride
            self._join(slice(first, first + lse.shape[1]), self._apart(first, Attended(out, lse)))
        if rest and periods >= skip:  # the last, partial period: one row for each residue that it has
            first = self.start + periods * stride
            rows = self.q[:, first : self.stop].transpose(0, 1)[:, :, None]  # [rest, H, 1, D]
            k, v = (self._residues(x, 0, periods - skip + 1, rest) for x in (self.k, self.v))
            found = attend(rows, k, v, scale=self.scale, tally=self.tally)
            out, lse = found.out[:, :, 0].transpose(0, 1), found.lse[:, :, 0].T
            self._join(slice(first, self.stop), self._apart(first, Attended(out, lse)))

    def horizontal(self) -> None:
        """Rows ``start + phase + t · stride`` over every key before them, in place of what they had."""
        stride = self.grid.stride
        lines = -(-(self.stop - self.start - int(self.phase.min())) // stride)
        chunk = max(CHUNK, CHUNK_TOKENS // stride)
        for begin in range(0, max(0, lines), chunk):
            step = torch.arange(begin, min(begin + chunk, lines), device=self.q.device) * stride
            wanted = self.start + self.phase[:, None] + step  # [H, c]
            rows = wanted.clamp(max=self.stop - 1)
            far = self.start + begin * stride  # every row of the chunk sees the keys before
            near = min(far + len(step) * stride, self.stop)
            mask = torch.arange(far, near, device=self.q.device) <= rows[..., None]
            q = take(self.q, rows)[None]
            found = attend(
                q,
                self.k[None, :, far:near],
                self.v[None, :, far:near],
                scale=self.scale,
                tally=self.tally,
                mask=mask[None],
            )
            if far:
                before = attend(q, self.k[None, :, :far], self.v[None, :, :far], scale=self.scale, tally=self.tally)
                joined = torch.empty_like(found.out)
                found = Attended(joined, join_into(joined, found, before))
            head, line = (wanted < self.stop).nonzero(as_tuple=True)
            where = rows[head, line]
            self.out[head, where] = found.out[0, head, line]
            self.lse[head, where] = found.lse[0, head, line]

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
