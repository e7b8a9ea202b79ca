"""Grid attention: a sink, a window, and lines of rows, columns and diagonals at a head's own stride and phase."""

from __future__ import annotations

from torch import Tensor

from vlmbench.kernels.calls import Attended, Tally
from vlmbench.kernels.grid import fused, lines
from vlmbench.kernels.grid.online import Found, find_lines, lines_of
from vlmbench.kernels.grid.reference import Grid, seen, visible
from vlmbench.kernels.sparse_lines.fused import Refused, preferred, warn

__all__ = ["Found", "Grid", "find_lines", "grid_attention", "lines_of", "seen", "visible"]


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
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``, `phase` int64 ``[B, H]``; returns ``[B, H, N, D]`` and ``[B, H, N]``.

    On a GPU one launch, two with diagonals, or after a `SlowPath` warning what the CPU runs.
    """
    if preferred(q.device) and not (tally and tally.dry):
        try:
            return fused.grid_attention(q, k, v, grid, phase, scale=scale, tally=tally)
        except Refused as refused:
            warn(refused)
    return lines.grid_attention(q, k, v, grid, phase, scale=scale, tally=tally)
