"""A-shape attention a tile of rows at a time: sink and window in one row of scores, one softmax over both.

Heads that share keys are rows of one matrix; the window's keys are a slice of the prompt's, nothing is copied. Two
triangles at the window's ends are masked: `ROWS` - 1 products more for each row than the rule needs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.a_shape.reference import seen
from vlmbench.kernels.calls import Attended, Tally, native
from vlmbench.kernels.calls.tiles import Buffer, fit_rows, softmaxed

ROWS = 64
"""Rows that share a window: fewer make small products, more compute more of the corners."""


class Singles(NamedTuple):
    """Keys that each head sees besides, one by one, from rows `local` behind them on; not under the sink."""

    at: Tensor
    """int64 ``[H, c]``, ascending."""
    k: Tensor
    """``[H, c, D]``"""
    v: Tensor


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
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``; returns ``[B, H, N, D]`` and its log-sum-exp ``[B, H, N]``.

    The last `tail` rows see every key (Tri-shape). Raises `ValueError` when `local` is below 1: a query sees itself.
    """
    if local < 1 or sink < 0 or tail < 0:
        raise ValueError(f"local must be at least 1 and sink and tail at least 0, not {local}, {sink} and {tail}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tally = tally if tally is not None else Tally()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for b in range(len(q)):
        into = Attended(out[b], lse[b])
        band(into, q[b], k[b], v[b], sink=sink, local=local, tail=tail, scale=scale, tally=tally)
    return Attended(out, lse)


def band(
    into: Attended,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: int,
    local: int,
    tail: int,
    scale: float,
    tally: Tally,
    singles: Singles | None = None,
) -> None:
    """One prompt, ``q [H, N, D]`` and ``k, v [Hkv, N, D]``, its `singles` with it."""
    heads, n = q.shape[:2]
    rows = torch.arange(n, device=q.device)
    bottom = max(0, n - tail)
    tally.pairs += heads * int(seen(rows, n, sink=sink, local=local, tail=tail).sum())
    if singles is not None:
        tally.pairs += int((bottom - local - singles.at).clamp(min=0).sum())
    tally.written |= not (native(q) or tally.dry)
    work = _Band(into, q, k, v, sink, local, bottom, scale, singles)
    for tile in work.tiles():
        # Of causal rows alone the corner counts as little as it does for dense attention.
        corner = tile.rows * (tile.rows - 1) // 2 if tile.causal else 0
        tally.computed += heads * (tile.rows * tile.width - corner)
        if not tally.dry:
            work.attend(tile)


class _Tile(NamedTuple):
    first: int
    stop: int
    near: int
    """The keys ``[near, stop)`` and, where they do not begin before, the sink's before them."""
    sink: int
    singles: int
    """How many of them a row of the tile may see."""
    causal: bool

    @property
    def rows(self) -> int:
        return self.stop - self.first

    @property
    def width(self) -> int:
        return self.sink + self.stop - self.near + self.singles


class _Band:
    def __init__(
        self,
        into: Attended,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: int,
        local: int,
        bottom: int,
        scale: float,
        singles: Singles | None,
    ) -> None:
        self.into, self.q, self.sink, self.local, self.bottom, self.scale = into, q, sink, local, bottom, scale
        self.heads, self.n, self.dim = q.shape
        self.scores, self.wanted, self.found = Buffer(q), Buffer(q), Buffer(q)
        dtype = self.wanted(0).dtype
        self.k, self.v = k.to(dtype), v.to(dtype)
        self.singles = singles and Singles(singles.at, singles.k.to(dtype), singles.v.to(dtype))
        first, last = ([], []) if singles is None else (f(singles.at, 0).tolist() for f in (torch.amin, torch.amax))
        self.known: tuple[list[int], list[int]] = first, last
        """Of each single key the first and the last place that it has among the heads."""
        self.corners: dict[tuple[int, int, int], Tensor] = {}

    def tiles(self) -> Iterator[_Tile]:
        """All rows in order; those that see all that is before them, on both sides of the others, have tiles of their own."""
        first = 0
        early = min(self.local, self.bottom)
        while first < self.n:
            causal = first < early or first >= self.bottom
            end = early if first < early else self.bottom if first < self.bottom else self.n
            near = 0 if causal else first - self.local + 1
            sink = self.sink if near > self.sink else 0
            near = near if near > self.sink else 0
            count = 0 if causal else bisect_left(self.known[0], first + ROWS - self.local)
            stop = min(end, first + fit_rows(self.heads, first - near + ROWS + sink + count, ROWS))
            count = 0 if causal else bisect_left(self.known[0], stop - self.local)
            yield _Tile(first, stop, near, sink, count, causal)
            first = stop

    def attend(self, tile: _Tile) -> None:
        rows, shared = tile.rows, self.heads // len(self.k)
        wanted = self.wanted(len(self.k), shared * rows, self.dim)
        by_head = (self.heads, rows, self.dim)
        torch.mul(self.q[:, tile.first : tile.stop].to(wanted.dtype), self.scale, out=wanted.view(by_head))
        own = tile.sink + tile.first - tile.near

        def diagonal(scores: Tensor) -> Tensor:
            return scores.view(self.heads, rows, -1)[:, :, own : own + rows].diagonal(dim1=1, dim2=2)

        weights, lse = softmaxed(partial(self._scores, tile, wanted), diagonal)
        found = self.found(*wanted.shape)
        width = tile.width - tile.singles
        torch.bmm(weights[:, :, tile.sink : width], self.v[:, tile.near : tile.stop], out=found)
        if tile.sink:
            found.baddbmm_(weights[:, :, : tile.sink], self.v[:, : tile.sink])
        if tile.singles and self.singles:
            alone = weights.view(self.heads, rows, -1)[:, :, width:]
            found.view(by_head).baddbmm_(alone, self.singles.v[:, : tile.singles])
        self.into.out[:, tile.first : tile.stop] = found.view(by_head)
        self.into.lse[:, tile.first : tile.stop] = lse

    def _scores(self, tile: _Tile, wanted: Tensor) -> Tensor:
        """``[Hkv, H / Hkv · rows, width]``: the sink, the window, the single keys; -inf where a row does not see."""
        rows, width = tile.rows, tile.width - tile.singles
        scores = self.scores(*wanted.shape[:2], tile.width)
        by_head = scores.view(self.heads, rows, -1)
        near = self.k[:, tile.near : tile.stop].transpose(1, 2)
        torch.bmm(wanted, near, out=scores[:, :, tile.sink : width])
        if tile.sink:
            torch.bmm(wanted, self.k[:, : tile.sink].transpose(1, 2), out=scores[:, :, : tile.sink])
        by_head[:, :, width - rows : width] += self._corner(rows, rows, 1)
        # Keys that the first row of the tile sees and the last does not.
        begin, end = max(tile.near, self.sink), tile.stop - self.local
        if not tile.causal and end > begin:
            at = tile.sink + begin - tile.near
            by_head[:, :, at : at + end - begin] += self._corner(rows, end - begin, tile.first - self.local - begin)
        if tile.singles and self.singles:
            alone = wanted.view(self.heads, rows, -1)
            keys = self.singles.k[:, : tile.singles].transpose(1, 2)
            torch.bmm(alone, keys, out=by_head[:, :, width:])
            some = bisect_left(self.known[1], tile.first - self.local + 1)  # what all rows see
            if some < tile.singles:
                behind = torch.arange(tile.first, tile.stop, device=wanted.device)[:, None] - self.local
                unseen = self.singles.at[:, None, some : tile.singles] > behind
                by_head[:, :, width + some :].masked_fill_(unseen, float("-inf"))
        return scores

    def _corner(self, rows: int, columns: int, diagonal: int) -> Tensor:
        """-inf from this diagonal on (above 0) or up to it, zeros elsewhere."""
        key = rows, columns, diagonal
        if key not in self.corners:
            blocked = self.k.new_full((rows, columns), float("-inf"))
            self.corners[key] = blocked.triu_(diagonal) if diagonal > 0 else blocked.tril_(diagonal)
        return self.corners[key]
