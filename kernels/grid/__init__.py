"""Grid attention: a sink, a window, and lines of rows, columns and diagonals at a head's own stride and phase."""

from __future__ import annotations

from vlmbench.kernels.grid.lines import grid_attention
from vlmbench.kernels.grid.online import Found, find_lines
from vlmbench.kernels.grid.reference import Grid, seen, visible

__all__ = ["Found", "Grid", "find_lines", "grid_attention", "seen", "visible"]
