"""A plan as kernels want it: regions of rows that see alike, and a table of query tiles, each inside one region."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.plan import Plan
from vlmbench.kernels.block_attention.remembered import remembered


class Region(NamedTuple):
    """Rows ``[start, stop)`` that see the keys ``[0, far)`` and, causally, the keys from `own` on."""

    start: int
    stop: int
    own: int
    far: int


def regions(plan: Plan) -> list[Region]:
    """In order, without gaps, none empty. The tail's own keys begin at 0, so it needs no far ones."""
    found = [
        Region(0, plan.sink, 0, 0),
        *(Region(start, stop, start, plan.sink) for start, stop in plan.blocks),
        Region(plan.tail, plan.length, 0, 0),
    ]
    return [region for region in found if region.stop > region.start]


@remembered(maxsize=32)
def query_tiles(plan: Plan, rows: int, groups: int, device: torch.device) -> Tensor:
    """``[n, 4]`` int32: a tile's first row, the row after its region's last, and the region's `own` and `far`.

    A row is one query head of a token: the `groups` heads that share a key head follow each other, token by token, so
    that a tile of `rows` rows spans few tokens. Longest first: the tail's tiles see the whole prompt, and started last
    they would run alone at the end. Made once a plan and device, so before any capture of a CUDA graph.
    """
    tiles = [
        (first, region.stop * groups, region.own, region.far)
        for region in regions(plan)
        for first in range(region.start * groups, region.stop * groups, rows)
    ]
    tiles.sort(key=lambda tile: tile[3] + (min(tile[0] + rows, tile[1]) - 1) // groups - tile[2], reverse=True)
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """Raises `ValueError` when the tensors are not of the plan's one prompt, or heads do not match or divide."""
    if q.shape[0] != 1:
        raise ValueError(f"a plan is of one prompt; the batch is {q.shape[0]}")
    if {x.shape[2] for x in (q, k, v)} != {plan.length}:
        lengths = f"q has {q.shape[2]}, k has {k.shape[2]} and v has {v.shape[2]}"
        raise ValueError(f"the plan is for {plan.length} tokens; {lengths}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads and v has {v.shape[1]}; they need as many")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
