"""Vertical-slash attention that computes only its blocks and columns: each row block's keys gathered, then one dense call.

The main block diagonal is a batched causal call. What else a row block sees lies wholly before it: the blocks of its slashes
and the kept columns outside of them, without masks but for the padding to the longest list of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.calls import Attended, Tally, attend, join_into, take
from vlmbench.kernels.vertical_slash.index import Index

GATHER_BYTES = 2**24
"""Gathered keys that are held at a time: what a processor's last cache can hold."""


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
    """``q, k, v [B, H, N, D]`` (as many heads each); returns ``[B, H, N, D]`` and its log-sum-exp ``[B, H, N]``.

    With `row_blocks` (sorted int64 ``[r]``) only these rows are computed; the others are zeros with a log-sum-exp of -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tally = tally if tally is not None else Tally()
    n, size = q.shape[2], index.block
    if n != index.length:
        raise ValueError(f"the index is for {index.length} tokens; q has {n}")
    wanted = torch.arange(-(-n // size), device=q.device) if row_blocks is None else row_blocks.to(q.device)
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    full = n // size
    for b in range(len(q)):
        here = Index(index.columns[b : b + 1], index.diagonals[b : b + 1], size, n)
        for rows, part, length in (
            (wanted[wanted < full], slice(0, full * size), size),
            (wanted[wanted >= full], slice(full * size, n), n - full * size),  # the last, shorter block
        ):
            if not len(rows):
                continue
            local = rows if length == size else rows - full
            own = [x[b, :, part].unflatten(1, (-1, length)).transpose(0, 1) for x in (q, k, v)]  # [R, H, length, D]
            if len(rows) != len(own[0]):
                own = [x[local] for x in own]
            found = attend(*own, scale=scale, tally=tally, causal=True)
            _add_gathered(found, own[0], k[b], v[b], here, rows, scale, tally)
            out[b, :, part].unflatten(1, (-1, length))[:, local] = found.out.transpose(0, 1)
            lse[b, :, part].unflatten(1, (-1, length))[:, local] = found.lse.transpose(0, 1)
    return Attended(out, lse)


def _add_gathered(
    own: Attended, q: Tensor, k: Tensor, v: Tensor, index: Index, rows: Tensor, scale: float, tally: Tally
) -> None:
    """Join what the row blocks ``q [r, H, length, D]`` see before themselves into `own`, a batch of row blocks at a time."""
    heads, dim, size = k.shape[0], k.shape[2], index.block
    within = torch.arange(size, device=q.device)
    first = 0
    # Row blocks of a batch are neighbours, whose lists are about as long; the longest is at the end.
    most = int(index.diagonals.sum(-1).max()) * size + index.columns.shape[2]
    batch = max(1, GATHER_BYTES // (2 * k.element_size() * dim * heads * most))
    while first < len(rows):
        chunk = slice(first, min(first + batch, len(rows)))
        first = chunk.stop
        blocks, n_blocks, columns, n_columns = (x[0] for x in lists(index, rows[chunk]))  # [H, r, ...]
        keys = torch.cat([(blocks[..., None] * size + within).flatten(2), columns], 2)  # [H, r, m]
        if keys.shape[2] == 0:
            continue
        valid = torch.cat(
            [
                (torch.arange(blocks.shape[2], device=q.device) < n_blocks[..., None]).repeat_interleave(size, 2),
                torch.arange(columns.shape[2], device=q.device) < n_columns[..., None],
            ],
            2,
        )
        seen_k, seen_v = (take(x, keys).flatten(0, 1)[:, None] for x in (k, v))  # [H · r, 1, m, D]
        wanted = q[chunk].transpose(0, 1).flatten(0, 1)[:, None]  # [H · r, 1, length, D]
        mask = None if bool(valid.all()) else valid.flatten(0, 1)[:, None, None]
        found = attend(wanted, seen_k, seen_v, scale=scale, tally=tally, mask=mask)
        shape = (heads, -1, q.shape[2])
        there = Attended(
            found.out.reshape(*shape, dim).transpose(0, 1), found.lse.reshape(shape).transpose(0, 1)
        )  # [r, H, length, D]
        out, lse = own.out[chunk], own.lse[chunk]
        lse.copy_(join_into(out, (out, lse), there))
