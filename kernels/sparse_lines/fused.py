"""Attention of heads of any mix of sparse patterns in one Triton launch, and a second one where heads have diagonals of a grid.

The kernels are in `fused_kernel`; here is what they take, what they refuse, and how they are launched.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import lru_cache
from math import log2
from typing import Any

import torch
from torch import Tensor

from vlmbench.kernels.block_attention import SlowPath
from vlmbench.kernels.block_attention.dense import Attended
from vlmbench.kernels.block_attention.fused import Refused, Tile, interpreted, refusal
from vlmbench.kernels.sparse_lines.table import ROWS, Table

__all__ = ["Attended", "Refused", "Tile", "attended", "dense", "preferred", "refusal", "warn"]

LARGE_ROWS = 2**15
"""Rows of a prompt from which tiles are chosen for throughput."""


def preferred(device: torch.device) -> bool:
    """Whether a device has nothing better than these kernels: the CPU has its own path."""
    return device.type != "cpu"


def warn(refused: Refused) -> None:
    """Say once that plain calls stand in; under ``--strict`` the words are an error."""
    warnings.warn(f"{refused} The masked reference stands in, as slow as dense attention.", SlowPath, stacklevel=2)


def attended(
    q: Tensor, k: Tensor, v: Tensor, table: Table, *, scale: float | None = None, tile: Tile | None = None,
    tiles: Tensor | None = None,
) -> Attended:  # fmt: skip
    """``q [B, H, n, D]``, ``k, v [B, Hkv, N, D]`` with H a multiple of Hkv; returns ``[B, H, n, D]`` and ``[B, H, n]``.

    Row r of q stands at ``table.shift + r`` among the keys. With `tiles` (int64, on the host) only these tiles of 64 rows are
    computed; the others are zeros with a log-sum-exp of -inf. A `tile` that is not given is tuned, if there are rows for more
    than one. Raises `Refused` for what the kernel cannot take, and `ValueError` when the tensors are not the table's.
    """
    _check(q, k, v, table)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reason = refusal(q, k, v) or (f"a scale of {scale} is not above 0" if scale <= 0 else None)
    if reason:
        raise Refused(f"The sparse attention kernel cannot run: {reason}.")
    from vlmbench.kernels.sparse_lines import fused_kernel

    batch, heads, n, dim = q.shape
    # As attention outputs lie in memory, heads behind tokens: the caller's transpose back is then free.
    out = torch.empty((batch, n, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, n), dtype=torch.float32, device=q.device)
    if tiles is not None:
        out.zero_()
        lse.fill_(float("-inf"))
    if tile is None and interpreted():
        tile = Tile(ROWS, 32)  # nothing to tune
    elif tile is None and (tiles is not None or n <= ROWS):
        tile = Tile(ROWS, 32, 4) if q.element_size() == 2 else Tile(ROWS, 16, 8)
    if tile and (tile.keys > ROWS or ((table.blocks is not None or tiles is not None) and tile.rows != ROWS)):
        raise ValueError(
            f"a tile has at most {ROWS} keys, and with an index {ROWS} rows, not {tile.rows} x {tile.keys}"
        )
    orders = {
        rows: _order(n, rows, table.lines, q.device) if tiles is None else _listed(tiles, table.lines, q.device)
        for rows in ((tile.rows,) if tile else fused_kernel.TUNED_ROWS)
    }
    both = [*orders.values()] * (2 if len(orders) == 1 else 1)
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    blocks = table.blocks if table.blocks is not None else (table.heads,) * 5  # not read
    index = (blocks[0], blocks[1], blocks[2], blocks[3], blocks[4])
    widths = (blocks[1].shape[1], blocks[0].shape[1], blocks[2].shape[1], blocks[3].shape[1])
    numbers = (scale * log2(torch.e), table.shift, table.shift + n, batch * heads, table.kinds, *widths)
    constants: dict[str, Any] = {
        "H": heads,
        "G": heads // k.shape[1],
        "D": dim,
        "BD": max(16, 1 << (dim - 1).bit_length()),
    }
    own = {"VS": table.blocks is not None, "BLOCK": table.block, "LARGE": n >= LARGE_ROWS}
    # Triton 3.10 no longer fuses a multiplication with an addition by itself; the kernel counts on it.
    options: dict[str, Any] = {**constants, **own, "enable_fp_fusion": True}
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if tile is None:
            launch = fused_kernel.lines_fwd[lambda meta: (len(orders[meta["BM"]]) * batch * heads,)]
        else:
            launch = fused_kernel.lines_fwd_kernel[(len(orders[tile.rows]) * batch * heads,)]
            options |= {"BM": tile.rows, "BN": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
        try:
            launch(q, k, v, out, lse, table.heads, *both, *index, *numbers, *strides, **options)
            if table.slashes:
                _go_on(fused_kernel, (q, k, v, out, lse, table.heads), table, numbers, strides, constants)
        except fused_kernel.OutOfResources as error:
            raise Refused(f"The sparse attention kernel cannot run: no tiling fits this card ({error}).") from None
    return Attended(out, lse)


def dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Attended:
    """Every row over every key, or with `causal` the last rows of the keys over those before them.

    ``q [B, H, n, D]``, ``k, v [B, Hkv, N, D]``; `causal` needs n at most N.
    """
    from vlmbench.kernels.sparse_lines.table import Pattern

    n, keys = q.shape[2], k.shape[2]
    shift = keys - n if causal else keys
    pattern = Pattern(whole=shift) if causal else Pattern(sink=keys)
    every = torch.arange(q.shape[1], device=q.device)
    return attended(q, k, v, Table.of([(every, pattern)], q.shape[0], n, q.device, shift=shift), scale=scale)


def _go_on(
    kernels: Any,
    tensors: tuple[Tensor, ...],
    table: Table,
    numbers: tuple[Any, ...],
    strides: list[int],
    constants: Any,
) -> None:
    """The diagonals of grids: rows of one residue together, their softmax gone on with where the first launch left it."""
    short, rows = tensors[0].element_size() == 2, 64
    # Of the last rows alone (`shift`) only a residue's last tiles, which come first, hold any.
    counts = [(min(-(-span // stride), -(-table.rows // stride) + rows), stride) for span, stride in table.slashes]
    tiles = max(stride * -(-count // rows) for count, stride in counts)
    shape = {"BM": rows, "BN": 64 if short else 16, "num_warps": 4 if short else 8, "num_stages": 2}
    launch = kernels.slash_fwd_kernel[(tiles * numbers[3],)]
    launch(*tensors, *numbers[:4], *strides, **constants, **shape, enable_fp_fusion=True)


@lru_cache(maxsize=64)
def _order(n: int, rows: int, lines: int, device: torch.device) -> Tensor:
    """int32: tiles of horizontal lines (below zero), then of rows, each the longest first.

    One tile more than the rows need: where some rows see everything, tiles begin anew.
    """
    return torch.tensor([*range(-lines // rows, 0), *range(-(-n // rows), -1, -1)], dtype=torch.int32).to(device)


def _listed(tiles: Tensor, lines: int, device: torch.device) -> Tensor:
    if lines:
        raise ValueError("some tiles alone are for heads without horizontal lines")
    return tiles.flip(0).to(device, torch.int32)


def _check(q: Tensor, k: Tensor, v: Tensor, table: Table) -> None:
    if k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {[*q.shape]}, k {[*k.shape]} and v {[*v.shape]} are not of one prompt with heads that divide"
        )
    if table.heads.shape[:2] != q.shape[:2] or table.rows != q.shape[2]:
        of = [*table.heads.shape[:2], table.rows]
        raise ValueError(f"the table is for prompts, heads and rows {of}; q has {[*q.shape[:3]]}")
