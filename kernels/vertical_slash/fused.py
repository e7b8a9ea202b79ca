"""Vertical-slash attention on a GPU: one launch of the kernel of `sparse_lines`, which reads a head's index as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.calls import Tally
from vlmbench.kernels.sparse_lines.fused import Attended, Tile, attended
from vlmbench.kernels.sparse_lines.table import ROWS, Pattern, Table
from vlmbench.kernels.vertical_slash.index import Index


def vertical_slash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    *,
    row_blocks: Tensor | None = None,
    scale: float | None = None,
    tally: Tally | None = None,
    tile: Tile | None = None,
) -> Attended:
    """As `gathered.vertical_slash`, and ``k, v [B, Hkv, N, D]`` may have fewer heads. Raises `Refused` and `ValueError`.

    With `row_blocks` whole tiles of 64 rows that hold one of them are computed; the others are zeros.
    """
    batch, heads, n = q.shape[:3]
    if n != index.length:
        raise ValueError(f"the index is for {index.length} tokens; q has {n}")
    table = Table.of([(torch.arange(heads, device=q.device), Pattern(index=index))], batch, n, q.device)
    tiles = None if row_blocks is None else (row_blocks.cpu() * index.block // ROWS).unique()
    found = attended(q, k, v, table, scale=scale, tile=tile, tiles=tiles)
    if tally is not None:
        rows = torch.arange(n, device=q.device)
        if tiles is not None:
            rows = rows[torch.isin(rows // ROWS, tiles.to(rows.device))]
        tally.launched(int(index.seen(rows).sum()))
    return found


def behind_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    first: int,
    *,
    scale: float | None = None,
    tile: Tile | None = None,
) -> Attended:
    """Rows ``q [B, H, n, D]``, at `first` and behind it in the prompt, over the `columns` before each of them.

    ``k, v [B, Hkv, N, D]``, `columns` int64 ``[B, H, c]``, ascending. Raises `Refused` and `ValueError`.
    """
    batch, heads, n = q.shape[:3]
    none = torch.zeros(batch, heads, -(-(first + n) // ROWS), dtype=torch.bool, device=q.device)
    pattern = Pattern(index=Index(columns, none, ROWS, first + n), single=True)
    table = Table.of([(torch.arange(heads, device=q.device), pattern)], batch, n, q.device, shift=first)
    return attended(q, k, v, table, scale=scale, tile=tile)
