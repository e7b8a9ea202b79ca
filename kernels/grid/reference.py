"""The meaning of a grid head: the union of a sink, a window, and lines at one distance, each pair once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmbench.kernels.a_shape.reference import seen as a_shape_seen


@dataclass(frozen=True)
class Grid:
    """Sizes in tokens. Lines lie in ``[start, stop)``, `stride` apart; `start` is at least `sink`.

    Rows from `stop` on (the question) see every key, so there is no ragged rest of the lines that is computed densely: the
    last partial period has its lines as every other one.
    """

    sink: int
    local: int
    start: int
    stop: int
    stride: int
    horizontal: bool = True
    """Rows of the class see every key before them."""
    vertical: bool = True
    """Keys of the class are seen by every row behind them."""
    slash: bool = False
    """A query sees the keys that lie a multiple of the stride before it."""

    def __post_init__(self) -> None:
        """Raises `ValueError`."""
        if self.local < 1 or self.stride < 1 or not 0 <= self.sink <= self.start:
            raise ValueError(
                f"a grid needs a window and a stride of at least 1 and lines behind the sink, not {self}; a query sees itself"
            )


def visible(grid: Grid, phase: Tensor, rows: Tensor, length: int) -> Tensor:
    """Boolean ``[B, H, r, N]`` for the queries at `rows`; `phase` ``[B, H]`` counts from ``grid.start``.

    ``j <= i and (j < sink or i - j < local or i >= stop or line)``, where a line needs i and j in ``[start, stop)`` and is
    ``i ≡ phase`` for a horizontal one, whose keys may also lie before `start`; ``j ≡ phase`` for a vertical one; and
    ``i ≡ j`` for a slash.
    """
    i, j = rows[:, None], torch.arange(length, device=rows.device)
    allowed = (j < grid.sink) | (i - j < grid.local) | (i >= grid.stop)
    row_in, key_in = ((x >= grid.start) & (x < grid.stop) for x in (i, j))
    first = (grid.start + phase)[..., None, None]
    if grid.horizontal:
        allowed = allowed | (row_in & ((i - first) % grid.stride == 0))
    if grid.vertical:
        allowed = allowed | (row_in & key_in & ((j - first) % grid.stride == 0))
    if grid.slash:
        allowed = allowed | (row_in & key_in & ((i - j) % grid.stride == 0))
    return ((j <= i) & allowed).expand(*phase.shape, len(rows), length)


def seen(grid: Grid, phase: Tensor, rows: Tensor, length: int) -> Tensor:
    """How many keys the queries at `rows` see: int64 ``[B, H, r]``, the row sums of `visible`."""
    held = a_shape_seen(rows, length, sink=grid.sink, local=grid.local)
    inside = (rows >= grid.start) & (rows < grid.stop)
    behind = rows - grid.start  # how far behind the first token that may hold a line
    own = (behind - phase[..., None]) % grid.stride == 0  # [B, H, r]
    found = held.expand(*phase.shape, -1)
    if grid.vertical:
        lines = (behind - grid.local - phase[..., None] + grid.stride).div(grid.stride, rounding_mode="floor")
        found = found + lines.clamp(min=0) * inside
    if grid.slash:
        lines = (behind // grid.stride + 1 - -(-grid.local // grid.stride)).clamp(min=0) * inside
        found = found + (lines * ~own if grid.vertical else lines)  # there it is the vertical line
    whole = rows >= grid.stop
    return torch.where((inside & own) | whole if grid.horizontal else whole, rows + 1, found)
