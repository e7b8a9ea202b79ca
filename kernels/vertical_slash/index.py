"""Which columns and which diagonals a head keeps, from the attention of its last queries (MInference, vertical-slash).

Diagonals are kept in whole blocks: a slash at offset o touches the block diagonals ⌊o / block⌋ and ⌈o / block⌉, so that
every requested pair is covered and the set is the same for all row blocks of a head. (The published kernel anchors its
blocks at each row block's end instead: it covers the same pairs and makes one list for each row block, one after the other.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vlmbench.kernels.last_queries.reference import Sums, sums

BLOCK = 64
FIRST, NEAR = 30, 100
"""Columns at the prompt's start and diagonals next to the main one that are always kept (published, at run time)."""


@dataclass(frozen=True)
class Index:
    """Of one prompt and layer. The main block diagonal is always kept, so that no row is empty."""

    columns: Tensor
    """int64 ``[B, H, nv]``, ascending."""
    diagonals: Tensor
    """Boolean ``[B, H, R]``: block diagonals that are kept, 0 the main one."""
    block: int
    length: int

    def visible(self, rows: Tensor) -> Tensor:
        """Boolean ``[B, H, r, N]``: ``j <= i and (j is a kept column or its block lies on a kept block diagonal)``."""
        j = torch.arange(self.length, device=rows.device)
        apart = (rows[:, None] // self.block - j // self.block).clamp(min=0)
        on_slash = self.diagonals[:, :, apart]
        in_column = torch.zeros(*self.columns.shape[:2], self.length, dtype=torch.bool, device=rows.device)
        in_column.scatter_(2, self.columns, True)
        return (j <= rows[:, None]) & (on_slash | in_column[:, :, None])

    def seen(self, rows: Tensor) -> Tensor:
        """How many keys the queries at `rows` see: int64 ``[B, H, r]``, the row sums of `visible`."""
        own, found = rows // self.block, []
        kept = self.diagonals[..., 1:].cumsum(-1)
        before = functional.pad(kept, (1, 0))[..., own] * self.block  # whole blocks before the row's own
        at = self.columns // self.block
        numbers, which = own.unique(return_inverse=True)
        for some in numbers.split(256):  # row blocks, whose lists of columns differ
            apart = (some[:, None] - at[:, :, None]).clamp(
                min=0
            )  # [B, H, r, nv]; a block's own is on the main diagonal
            kept_there = self.diagonals.gather(2, apart.flatten(2)).view(apart.shape)
            found.append(((apart > 0) & ~kept_there).sum(-1))
        single = torch.cat(found, -1)[..., which]
        return before + single + rows % self.block + 1


def make_index(
    weights: Tensor, *, columns: int, slashes: int, first: int = FIRST, near: int = NEAR, block: int = BLOCK
) -> Index:
    """As `index_of`, from `weights` ``[B, H, L, N]``, the softmax rows of the last L queries."""
    return index_of(sums(weights), columns=columns, slashes=slashes, first=first, near=near, block=block)


def index_of(
    seen: Sums, *, columns: int, slashes: int, first: int = FIRST, near: int = NEAR, block: int = BLOCK
) -> Index:
    """Top columns and diagonals of what the last queries attend to.

    `columns` and `slashes` include the forced ones: the `first` columns and the `near` diagonals from the main one on. Each
    is at least that many and at most N; the main diagonal is kept whatever is asked for.
    """
    batch, heads, n = seen.columns.shape
    first, near = min(first, n), max(1, min(near, n))
    vertical, slash = seen.columns.clone(), seen.diagonals.clone()
    vertical[..., :first] = float("inf")
    slash[..., :near] = float("inf")
    kept = vertical.topk(min(max(columns, first, 1), n)).indices.sort().values
    offsets = slash.topk(min(max(slashes, near), n)).indices
    diagonals = torch.zeros(batch, heads, -(-n // block) + 1, dtype=torch.bool, device=slash.device)
    for touched in (offsets // block, -(-offsets // block)):
        diagonals.scatter_(2, touched, True)
    return Index(kept, diagonals[..., : -(-n // block)], block, n)
