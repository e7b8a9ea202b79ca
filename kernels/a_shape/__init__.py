"""A-shape attention: the first tokens, and a window behind every query; as Tri-shape, the last rows see everything."""

from __future__ import annotations

from torch import Tensor

from vlmbench.kernels.a_shape import banded, fused
from vlmbench.kernels.a_shape.reference import seen, visible
from vlmbench.kernels.calls import Attended, Tally
from vlmbench.kernels.sparse_lines.fused import Refused, preferred, warn

__all__ = ["a_shape", "seen", "visible"]


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

    The last `tail` rows see every key (Tri-shape). On a GPU one launch, or after a `SlowPath` warning what the CPU runs.
    Raises `ValueError` when `local` is below 1: a query sees itself.
    """
    if preferred(q.device) and not (tally and tally.dry):
        try:
            return fused.a_shape(q, k, v, sink=sink, local=local, tail=tail, scale=scale, tally=tally)
        except Refused as refused:
            warn(refused)
    return banded.a_shape(q, k, v, sink=sink, local=local, tail=tail, scale=scale, tally=tally)
