"""Grid attention on a GPU: one launch of the kernel of `sparse_lines`, and one more for diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.calls import Tally
from vlmbench.kernels.grid.reference import Grid, seen
from vlmbench.kernels.sparse_lines.fused import Attended, Tile, attended
from vlmbench.kernels.sparse_lines.table import Pattern, Table


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    phase: Tensor,
    *,
    scale: float | None = None,
    tally: Tally | None = None,
    tile: Tile | None = None,
) -> Attended:
    """As `lines.grid_attention`, and ``k, v [B, Hkv, N, D]`` may have fewer heads. Raises `Refused` and `ValueError`."""
    batch, heads, n = q.shape[:3]
    every = torch.arange(heads, device=q.device)
    table = Table.of([(every, pattern(grid, phase))], batch, n, q.device)
    found = attended(q, k, v, table, scale=scale, tile=tile)
    if tally is not None:
        tally.launched(int(seen(grid, phase, torch.arange(n, device=phase.device), n).sum()))
    return found


def pattern(grid: Grid, phase: Tensor, stride: Tensor | None = None, strides: tuple[int, ...] = ()) -> Pattern:
    """Of heads at the grid's stride, or each at its own `stride` ``[B, h]`` of `strides`, `phase` ``[B, h]`` of that."""
    return Pattern(
        grid.sink,
        grid.local,
        grid.stop,
        grid.start,
        grid.stop,
        strides or (grid.stride,),
        stride,
        phase % (grid.stride if stride is None else stride),
        grid.horizontal,
        grid.vertical,
        grid.slash,
    )
