"""Block attention in one Triton launch: only the allowed pairs, no mask, no copied sink, no repeated key heads.

The kernel is in `fused_kernel`; here is what it takes, what it refuses, and how it is launched.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from math import log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.dense import Attended
from vlmbench.kernels.block_attention.plan import Plan
from vlmbench.kernels.block_attention.remembered import remembered
from vlmbench.kernels.block_attention.tiles import check_shapes, query_tiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 128
LARGE_PAIRS = 2**28
"""Pairs of all heads together, about a fifth of a millisecond on an H200, from which tiles are chosen for throughput."""


class Refused(ValueError):
    """The kernel cannot take these tensors; the message says why."""


class Tile(NamedTuple):
    """A tiling fixed by hand, instead of the tuned one."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, tile: Tile | None = None
) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``.

    Raises `Refused` for what the kernel cannot take, and `ValueError` when the tensors are not the plan's.
    """
    return attended(q, k, v, plan, scale=scale, tile=tile).out


def attended(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, tile: Tile | None = None
) -> Attended:
    """The same with its log-sum-exp ``[1, H, N]``, for joining with attention over further keys."""
    check_shapes(q, k, v, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reason = refusal(q, k, v) or (f"a scale of {scale} is not above 0" if scale <= 0 else None)
    if reason:
        raise Refused(f"The block attention kernel cannot run: {reason}.")
    from vlmbench.kernels.block_attention import fused_kernel

    heads, length, dim = q.shape[1:]
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    # As attention outputs lie in memory, heads behind tokens: the caller's transpose back is then free.
    out = torch.empty((1, length, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((1, heads, length), dtype=torch.float32, device=q.device)
    if tile is None and interpreted():
        tile = Tile(64, 32)  # nothing to tune
    tables = {
        rows: query_tiles(plan, rows, groups, q.device) for rows in ((tile.rows,) if tile else fused_kernel.TUNED_ROWS)
    }
    strides = (stride for x in (q, k, v, out) for stride in x.stride()[1:3])
    arguments = (q, k, v, out, lse, *_both(list(tables.values())), scale * log2(torch.e), length, *strides)
    constants = {
        "HKV": kv_heads,
        "G": groups,
        "D": dim,
        "BD": max(16, 1 << (dim - 1).bit_length()),
        "LARGE": _is_large(plan, heads),
    }
    # Triton 3.10 no longer fuses a multiplication with an addition by itself; the kernel counts on it.
    options: dict[str, Any] = {**constants, "enable_fp_fusion": True}
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if tile is None:
            launch = fused_kernel.block_attention_fwd[lambda meta: (len(tables[meta["BM"]]) * kv_heads,)]
        else:
            launch = fused_kernel.block_attention_fwd_kernel[(len(tables[tile.rows]) * kv_heads,)]
            options |= {"BM": tile.rows, "BN": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
        try:
            launch(*arguments, **options)
        except fused_kernel.OutOfResources as error:
            raise Refused(f"The block attention kernel cannot run: no tiling fits this card ({error}).") from None
    return Attended(out, lse)


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot take these tensors; None when it can."""
    reason = no_kernel(q.device)
    if reason:
        return reason
    if q.dtype not in DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        return f"q, k and v are {names}, and it takes bfloat16, float16 or float32, the same for all"
    if q.shape[-1] > MAX_HEAD_DIM or {k.shape[-1], v.shape[-1]} != {q.shape[-1]}:
        dims = ", ".join(str(x.shape[-1]) for x in (q, k, v))
        return f"the head dimensions of q, k and v are {dims}, and it takes one of at most {MAX_HEAD_DIM}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "a head's numbers do not lie side by side in memory"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "a gradient is asked for, and it has none"
    return None


def no_kernel(device: torch.device) -> str | None:
    """Why the kernel cannot run on this device at all; None when it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return None if interpreted() else "it needs a GPU"
    if device.type != "cuda":
        return f"it needs CUDA, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, and this card has {major}.{minor}"


def interpreted() -> bool:
    """Whether triton interprets kernels on the CPU. It settles that when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _both(tables: list[Tensor]) -> list[Tensor]:
    """The kernel takes a table for each tuned number of rows; with a fixed tiling there is one."""
    return tables * 2 if len(tables) == 1 else tables


@remembered(maxsize=32)
def _is_large(plan: Plan, heads: int) -> bool:
    return plan.pairs * heads >= LARGE_PAIRS
