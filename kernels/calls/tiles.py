"""Scores of some rows at a time, in one buffer that stays in the cache: one softmax over all that a row sees, in place.

Two matrix products around torch's own softmax are faster on a CPU than its flash kernel (186 against 158 GFLOP/s on two
cores), since tiles may be wide, heads that share keys are one matrix, and nothing is joined afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCORES_BYTES = 2**24
"""Scores that are held at a time: they are written once and read three times, from a processor's last cache."""
TINY = 1e-30
"""Below this a probability in float32 has lost digits or will have soon."""


class Softmaxed(NamedTuple):
    weights: Tensor
    """The scores' own memory."""
    lse: Tensor
    """As `own` gives them."""


def softmaxed(scores: Callable[[], Tensor], own: Callable[[Tensor], Tensor]) -> Softmaxed:
    """Softmax over the last dimension of what `scores` writes, in place, with its log-sum-exp.

    `own` picks one score of each row, which must be allowed: as a probability p it tells the log-sum-exp, s - log p, without
    another look at the row. Where p is too small to tell, `scores` is called again.
    """
    found = scores()
    before = own(found).clone()
    torch.softmax(found, -1, out=found)
    after = own(found)
    if not float(after.min()) < TINY:  # NaN stays NaN
        return Softmaxed(found, before - after.log())
    found = scores()
    lse = found.logsumexp(-1)
    torch.softmax(found, -1, out=found)
    return Softmaxed(found, lse.view(before.shape))


class Buffer:
    """Memory for tensors of changing shapes, one after the other: fresh pages would cost as much as filling them."""

    def __init__(self, like: Tensor) -> None:
        self._held = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))

    def __call__(self, *shape: int) -> Tensor:
        """A contiguous tensor; what was handed out before is overwritten."""
        size = 1
        for each in shape:
            size *= each
        if size > len(self._held):
            self._held = self._held.new_empty(size + size // 2)  # the next ones will be a little larger
        return self._held[:size].view(shape)


def fit_rows(heads: int, width: int, most: int, itemsize: int = 4) -> int:
    """Rows whose scores over `width` keys stay within `SCORES_BYTES`, at most `most` and at least 8."""
    return max(8, min(most, SCORES_BYTES // (itemsize * heads * max(width, 1)) // 8 * 8))
