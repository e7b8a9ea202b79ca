"""The meaning of A-shape and Tri-shape: which keys a query sees."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(rows: Tensor, length: int, *, sink: int, local: int, tail: int = 0) -> Tensor:
    """Boolean ``[r, N]`` for the queries at `rows`: ``j <= i and (j < sink or i - j < local or i >= N - tail)``."""
    i, j = rows[:, None], torch.arange(length, device=rows.device)
    return (j <= i) & ((j < sink) | (i - j < local) | (i >= length - tail))


def seen(rows: Tensor, length: int, *, sink: int, local: int, tail: int = 0) -> Tensor:
    """How many keys the queries at `rows` see: int64 ``[r]``, the row sums of `visible`."""
    held = (rows + 1).clamp(max=local) + (rows + 1 - local).clamp(min=0, max=sink)
    return torch.where(rows >= length - tail, rows + 1, held)
