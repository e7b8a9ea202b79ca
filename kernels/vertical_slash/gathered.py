"""Vertical-slash attention that computes only its blocks and columns: each row block's keys gathered, then one softmax.

A row block sees itself, causally, and what lies wholly before it: the blocks of its slashes and the kept columns outside of
them. Keys and then values are gathered into one buffer that stays in the cache, of a few row blocks and heads at a time, and
multiplied there; nothing is masked but the block's own corner and the padding to the longest list of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.calls import Attended, Tally, native
from vlmbench.kernels.calls.tiles import Buffer, softmaxed
from vlmbench.kernels.vertical_slash.index import Index

GATHER_BYTES = 2**22
"""Gathered keys that are held at a time: with the scores, what a processor's last cache can hold."""
LISTED = 32
"""Row blocks whose lists are made together."""


class Lists(NamedTuple):
    """What row blocks ``[first, stop)`` see before themselves, of each prompt and head; lists are padded to the longest."""

    blocks: Tensor
    """int64 ``[B, H, r, nb]``: key blocks, then padding."""
    n_blocks: Tensor
    """int64 ``[B, H, r]``"""
    columns: Tensor
    """int64 ``[B, H, r, nc]``: single keys outside of these blocks, then padding."""
    n_columns: Tensor
    """int64 ``[B, H, r]``"""


def lists(index: Index, rows: Tensor) -> Lists:
    """The two lists of the row blocks at `rows` ``[r]``; they are disjoint, and neither holds the row block itself."""
    number = torch.arange(index.diagonals.shape[2], device=rows.device)
    apart = rows[:, None] - number  # [r, R]: how far a key block lies before a row block
    seen = index.diagonals[:, :, apart.clamp(min=0)] & (apart > 0)  # [B, H, r, R]
    at = index.columns // index.block  # [B, H, nv]
    before = at[:, :, None] < rows[:, None]  # [B, H, r, nv]
    single = before & ~seen.gather(3, at[:, :, None].expand(-1, -1, len(rows), -1))
    return Lists(*_packed(seen, number.expand_as(seen)), *_packed(single, index.columns[:, :, None].expand_as(single)))


def _packed(chosen: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen `values` of every list first, cut to the longest list, and how many there are."""
    counts = chosen.sum(-1)
    longest = int(counts.max()) if counts.numel() else 0
    packed = torch.zeros(*chosen.shape[:-1], longest + 1, dtype=torch.long, device=chosen.device)
    place = torch.where(chosen, chosen.cumsum(-1) - 1, longest)  # what is not chosen goes to a last, dropped place
    packed.scatter_(-1, place, values)
    return packed[..., :longest], counts


def vertical_slash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    *,
    row_blocks: Tensor | None = None,
    scale: float | None = None,
    tally: Tally | None = None,
) -> Attended:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``; returns ``[B, H, N, D]`` and its log-sum-exp ``[B, H, N]``.

    With `row_blocks` (sorted int64 ``[r]``) only these rows are computed; the others are zeros with a log-sum-exp of -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tally = tally if tally is not None else Tally()
    n, size = q.shape[2], index.block
    if n != index.length:
        raise ValueError(f"the index is for {index.length} tokens; q has {n}")
    wanted = torch.arange(-(-n // size), device=q.device) if row_blocks is None else row_blocks.to(q.device)
    # What is not computed is zeros; where all is, nobody needs them.
    out = torch.empty_like(q) if row_blocks is None else torch.zeros_like(q)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    tally.written |= not (native(q) or tally.dry)
    full = n // size
    for b in range(len(q)):
        here = Index(index.columns[b : b + 1], index.diagonals[b : b + 1], size, n)
        work = _Gathered(q[b], k[b], v[b], here, scale, tally)
        for rows, part, length in (
            (wanted[wanted < full], slice(0, full * size), size),
            (wanted[wanted >= full], slice(full * size, n), n - full * size),  # the last, shorter block
        ):
            asked, into, sums = (x[b, :, part].unflatten(1, (-1, max(length, 1))) for x in (q, out, lse))
            for some in rows.split(LISTED) if len(rows) else ():
                at = some if length == size else some - full
                found = work.attend(asked[:, at], some)
                if found is not None:
                    into[:, at], sums[:, at] = found.out.to(out.dtype), found.lse
    return Attended(out, lse)


class _Gathered:
    """Row blocks of one prompt, ``q [H, N, D]`` and ``k, v [Hkv, N, D]``."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float, tally: Tally) -> None:
        self.index, self.scale, self.tally = index, scale, tally
        self.wanted, self.found, self.gathered, self.scores = (Buffer(q) for _ in range(4))
        dtype = self.wanted(0).dtype
        behind = k.stride(1) >= k.stride(0)  # heads behind tokens, as models hand them over
        self.k, self.v = ((x.transpose(0, 1) if behind else x).to(dtype).reshape(-1, x.shape[2]) for x in (k, v))
        theirs = torch.arange(len(q), device=q.device) // (len(q) // len(k))
        self.step, self.start = (len(k), theirs) if behind else (1, theirs * k.shape[1])
        """Key j of head h is row ``start[h] + step · j`` of `k`."""

    def attend(self, q: Tensor, rows: Tensor) -> Attended | None:
        """The row blocks ``q [H, r, length, D]`` at `rows`: ``[H, r, length, D]`` and ``[H, r, length]``, or None when dry."""
        heads, count, length, dim = q.shape
        wanted = self.wanted(count, heads, length, dim)
        if not self.tally.dry:
            torch.mul(q.transpose(0, 1).to(wanted.dtype), self.scale, out=wanted)
        found, lse = self.found(*wanted.shape).flatten(0, 1), q.new_empty(count * heads, length, dtype=torch.float32)
        wanted = wanted.flatten(0, 1)
        corner = wanted.new_full((length, length), float("-inf")).triu_(1)
        for batch in self._batches(rows, heads, length, dim):
            items, width = batch.keys.shape
            self._count(batch, length)
            if self.tally.dry:
                continue
            asked, at = wanted[batch.items], batch.keys.flatten()

            def scores(batch: _Batch = batch, asked: Tensor = asked, at: Tensor = at) -> Tensor:
                keys = torch.index_select(self.k, 0, at, out=self.gathered(len(at), dim))
                into = self.scores(*asked.shape[:2], len(at) // len(asked))
                torch.bmm(asked, keys.view(len(asked), -1, dim).transpose(1, 2), out=into)
                into[:, :, :length] += corner
                for first, padded in batch.padded:
                    into[:, :, first : first + padded.shape[1]].masked_fill_(padded[:, None], float("-inf"))
                return into

            weights, lse[batch.items] = softmaxed(scores, lambda s: s[:, :, :length].diagonal(dim1=1, dim2=2))
            values = torch.index_select(self.v, 0, at, out=self.gathered(len(at), dim))
            torch.bmm(weights, values.view(items, width, dim), out=found[batch.items])
        if self.tally.dry:
            return None
        return Attended(*(x.unflatten(0, (count, heads)).transpose(0, 1) for x in (found, lse)))

    def _batches(self, rows: Tensor, heads: int, length: int, dim: int) -> Iterator[_Batch]:
        """Of row blocks and heads together, in this order: neighbours have lists of about one length."""
        size, count = self.index.block, len(rows)
        blocks, n_blocks, columns, n_columns = (x[0].transpose(0, 1).flatten(0, 1) for x in lists(self.index, rows))
        within = torch.arange(size, device=rows.device)
        own = (rows[:, None, None] * size + within[:length]).expand(count, heads, length).flatten(0, 1)
        keys = torch.cat([own, (blocks[..., None] * size + within).flatten(1), columns], 1)
        keys = keys * self.step + self.start.repeat(count)[:, None]
        n_slash = n_blocks * size
        slash, single = n_slash.tolist(), n_columns.tolist()
        first, behind = 0, length + blocks.shape[1] * size
        while first < len(keys):
            fit = GATHER_BYTES // (4 * dim * (length + slash[first] + single[first]))
            here = slice(first, min(len(keys), first + max(2, fit // 2 * 2)))  # an even number, for two cores
            first = here.stop
            most, longest = max(slash[here]), max(single[here])
            chosen = keys[here]
            if most < blocks.shape[1] * size or longest < columns.shape[1]:
                chosen = torch.cat([chosen[:, : length + most], chosen[:, behind : behind + longest]], 1)
            padded = []
            for begin, counts, known in ((length, n_slash, slash), (length + most, n_columns, single)):
                least, end = min(known[here]), max(known[here])
                if least < end:
                    number = torch.arange(least, end, device=rows.device)
                    padded.append((begin + least, number >= counts[here, None]))
            yield _Batch(here, chosen, sum(slash[here]) + sum(single[here]), padded)

    def _count(self, batch: _Batch, length: int) -> None:
        items, width = batch.keys.shape
        corner = items * length * (length - 1) // 2
        self.tally.pairs += (items * length + batch.before) * length - corner
        self.tally.computed += items * width * length - corner


class _Batch(NamedTuple):
    items: slice
    """Of row blocks and heads."""
    keys: Tensor
    """int64 ``[items, width]``, rows of the keys: the row block's own, those of its slashes, its columns."""
    before: int
    """How many keys all of them see before their row blocks."""
    padded: list[tuple[int, Tensor]]
    """From which of the keys on some are padding, and which, ``[items, c]``."""
