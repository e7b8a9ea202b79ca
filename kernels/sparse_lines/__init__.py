"""The kernel behind sparse patterns on a GPU: heads of any mix of windows, grids and vertical-slash indices in one launch."""

from __future__ import annotations

from vlmbench.kernels.sparse_lines.fused import Refused, attended, preferred, refusal, warn
from vlmbench.kernels.sparse_lines.table import Pattern, Table

__all__ = ["Pattern", "Refused", "Table", "attended", "preferred", "refusal", "warn"]
