"""Vertical-slash attention: a head's own columns and diagonals, chosen from the attention of its last queries."""

from __future__ import annotations

from torch import Tensor

from vlmbench.kernels.calls import Attended, Tally
from vlmbench.kernels.last_queries import diagonal_sums
from vlmbench.kernels.sparse_lines.fused import Refused, preferred, warn
from vlmbench.kernels.vertical_slash import fused, gathered
from vlmbench.kernels.vertical_slash.gathered import Lists, lists
from vlmbench.kernels.vertical_slash.index import FIRST, NEAR, Index, index_of, make_index

__all__ = ["FIRST", "NEAR", "Index", "Lists", "diagonal_sums", "index_of", "lists", "make_index", "vertical_slash"]


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

    With `row_blocks` (sorted int64 ``[r]``) only these rows are sure to be computed; the others may be zeros with a
    log-sum-exp of -inf. On a GPU one launch, or after a `SlowPath` warning what the CPU runs.
    """
    if preferred(q.device) and not (tally and tally.dry):
        try:
            return fused.vertical_slash(q, k, v, index, row_blocks=row_blocks, scale=scale, tally=tally)
        except Refused as refused:
            warn(refused)
    return gathered.vertical_slash(q, k, v, index, row_blocks=row_blocks, scale=scale, tally=tally)
