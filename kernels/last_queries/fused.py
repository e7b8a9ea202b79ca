"""The last queries' attention on a GPU: its log-sum-exp, and its sums along columns and diagonals, never the weights.

The kernels are in `fused_kernel`; here is what they take, what they refuse, and how they are launched.
"""

from __future__ import annotations

from contextlib import nullcontext
from math import log2
from typing import Any

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.fused import Refused, Tile, refusal
from vlmbench.kernels.last_queries.reference import Sums

ROWS = 64
"""Last queries that a program takes, at most."""
PROGRAMS = 1024
"""About as many as are launched: a few for each place on a card, and none so short that the tile it reads twice counts."""
LEAST = 8
"""Tiles of a program at least."""


def log_sum_exp(q: Tensor, k: Tensor, heads: Tensor, *, scale: float | None = None, tile: Tile | None = None) -> Tensor:
    """Of the scores of ``q [B, H, L, D]``, the last L of N queries, over ``k [B, Hkv, N, D]``, causal: float32 ``[B, h, L]``.

    Of the `heads` alone, int64 ``[h]``; Hkv divides H. Raises `Refused` for what the kernel cannot take, and `ValueError`
    for more than 64 queries or tensors that do not belong together.
    """
    scale = _checked(q, k, scale)
    from vlmbench.kernels.last_queries import fused_kernel

    tile = tile or _tile(q)
    n, programs, length = k.shape[2], q.shape[0] * len(heads), _length(q, k, heads, tile)
    count = _cdiv(_cdiv(n, tile.keys), length)
    parts = torch.empty((q.shape[0], len(heads), count, ROWS), dtype=torch.float32, device=q.device)
    numbers = (scale * log2(torch.e), n, q.shape[2], len(heads), programs, count, length)
    _launch(fused_kernel, fused_kernel.lse_kernel, count * programs, (q, k, heads, parts, *numbers), q, k, tile)
    return parts.logsumexp(2)[..., : q.shape[2]]


def sums(
    q: Tensor,
    k: Tensor,
    heads: Tensor,
    lse: Tensor,
    *,
    diagonals: bool = True,
    scale: float | None = None,
    tile: Tile | None = None,
) -> Sums:
    """As `reference.sums` of the weights of these `heads`, whose `lse` is `log_sum_exp`'s; the same in every run.

    Without `diagonals` they are ``[B, h, 0]``. Raises as `log_sum_exp`.
    """
    scale = _checked(q, k, scale)
    if lse.shape != (q.shape[0], len(heads), q.shape[2]):
        raise ValueError(f"lse {[*lse.shape]} is not of {len(heads)} heads of q {[*q.shape]}")
    from vlmbench.kernels.last_queries import fused_kernel

    tile = tile or _tile(q)
    if tile.keys < ROWS:
        raise ValueError(f"a tile must have at least {ROWS} keys, not {tile.keys}: a diagonal would cross three")
    n, programs, length = k.shape[2], q.shape[0] * len(heads), _length(q, k, heads, tile)
    count = _cdiv(_cdiv(n, tile.keys) + diagonals, length)
    columns = torch.empty((q.shape[0], len(heads), n), dtype=torch.float32, device=q.device)
    along = torch.empty_like(columns) if diagonals else columns[..., :0]
    numbers = (scale * log2(torch.e), n, q.shape[2], len(heads), programs, length)
    arguments = (q, k, heads, lse.contiguous(), columns, along if diagonals else columns, *numbers)
    _launch(fused_kernel, fused_kernel.sums_kernel, count * programs, arguments, q, k, tile, DIAGONALS=diagonals)
    return Sums(columns, along)


def _checked(q: Tensor, k: Tensor, scale: float | None) -> float:
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or not 0 < q.shape[2] <= min(ROWS, k.shape[2]):
        raise ValueError(
            f"q {[*q.shape]} and k {[*k.shape]} are not the last queries (at most {ROWS}) of one prompt with heads that divide"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reason = refusal(q, k, k) or (f"a scale of {scale} is not above 0" if scale <= 0 else None)
    if reason:
        raise Refused(f"The kernel of the last queries cannot run: {reason}.")
    return scale


def _tile(q: Tensor) -> Tile:
    """What spills no register on compute capability 9.0."""
    return Tile(ROWS, 64, 4, 3) if q.element_size() == 2 else Tile(ROWS, 64, 16, 2)


def _length(q: Tensor, k: Tensor, heads: Tensor, tile: Tile) -> int:
    """Tiles of a program: by the shapes alone, so that nothing but the prompt decides in which order numbers are added."""
    return max(LEAST, _cdiv(k.shape[2], tile.keys) * q.shape[0] * len(heads) // PROGRAMS)


def _launch(
    kernels: Any,
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    tile: Tile,
    **constants: Any,
) -> None:
    strides = [stride for x in (q, k) for stride in x.stride()[:3]]
    dim = q.shape[3]
    shape = {"G": q.shape[1] // k.shape[1], "D": dim, "BD": max(16, 1 << (dim - 1).bit_length()), "BN": tile.keys}
    # Triton 3.10 no longer fuses a multiplication with an addition by itself; the kernel counts on it.
    options = {**shape, **constants, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        try:
            kernel[(programs,)](*arguments, *strides, **options)
        except kernels.OutOfResources as error:
            raise Refused(f"The kernel of the last queries cannot run: it does not fit this card ({error}).") from None


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
