"""A-shape attention on a GPU: one launch of the kernel of `sparse_lines`."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbench.kernels.a_shape.reference import seen
from vlmbench.kernels.calls import Tally
from vlmbench.kernels.sparse_lines.fused import Attended, Tile, attended
from vlmbench.kernels.sparse_lines.table import Pattern, Table


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
    tile: Tile | None = None,
) -> Attended:
    """As `banded.a_shape`, and ``k, v [B, Hkv, N, D]`` may have fewer heads. Raises `Refused` and `ValueError`."""
    if local < 1 or sink < 0 or tail < 0:
        raise ValueError(f"local must be at least 1 and sink and tail at least 0, not {local}, {sink} and {tail}")
    batch, heads, n = q.shape[:3]
    pattern = Pattern(sink, local, max(0, n - tail))
    table = Table.of([(torch.arange(heads, device=q.device), pattern)], batch, n, q.device)
    found = attended(q, k, v, table, scale=scale, tile=tile)
    if tally is not None:
        tally.launched(batch * heads * int(seen(torch.arange(n), n, sink=sink, local=local, tail=tail).sum()))
    return found
