"""The same attention through FlexAttention: a table of 128 × 128 tiles made from the plan, and its rule inside them.

There to be compared with `fused` on a GPU; whichever is slower goes. Compiled on CUDA; elsewhere eager, which computes
every pair and is for tests on small shapes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vlmbench.kernels.block_attention.plan import Plan
from vlmbench.kernels.block_attention.remembered import remembered
from vlmbench.kernels.block_attention.tiles import check_shapes, regions

TILE = 128


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``."""
    check_shapes(q, k, v, plan)
    attend = _compiled() if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=block_mask(plan, q.device), scale=scale, enable_gqa=True)


@remembered(maxsize=8)
def block_mask(plan: Plan, device: torch.device) -> BlockMask:
    """Made once a plan and device, from the plan's edges: no N × N mask is ever evaluated."""
    some, whole = tile_table(plan)
    own, far = torch.zeros(2, plan.length, dtype=torch.int32)
    for region in regions(plan):
        own[region.start : region.stop], far[region.start : region.stop] = region.own, region.far
    own, far = own.to(device), far.to(device)

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((j < far[i]) | (j >= own[i]))

    lists = (*_listed(some & ~whole), *_listed(whole))
    n_some, which_some, n_whole, which_whole = (table[None, None].to(device) for table in lists)
    return BlockMask.from_kv_blocks(
        n_some, which_some, n_whole, which_whole, TILE, rule, seq_lengths=(plan.length, plan.length)
    )


def tile_table(plan: Plan, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Which key tiles hold a pair of each query tile, and which only such pairs: two booleans ``[n, n]``.

    A last tile that is not full never counts as whole.
    """
    edges = torch.arange(0, plan.length, tile)
    low, high = edges, (edges + tile).clamp(max=plan.length) - 1  # first and last key
    some = torch.zeros(len(edges), len(edges), dtype=torch.bool)
    whole = (edges + tile <= plan.length).expand_as(some).clone()
    for region in regions(plan):
        touched = slice(region.start // tile, (region.stop - 1) // tile + 1)
        first = edges[touched].clamp(min=region.start)[:, None]  # the region's rows in each of its query tiles
        last = (edges[touched] + tile).clamp(max=region.stop)[:, None] - 1
        joined = region.own <= region.far  # then nothing lies between the far keys and the own ones
        some[touched] |= (low < region.far) | ((high >= region.own) & (low <= last))
        whole[touched] &= (high < region.far) | ((joined | (low >= region.own)) & (high <= first))
    return some, whole


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are set, and the columns, those set first: int32 ``[n]`` and ``[n, n]``."""
    order = table.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return table.sum(1, dtype=torch.int32), order.to(torch.int32)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
