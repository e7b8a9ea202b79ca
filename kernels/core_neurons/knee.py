"""Core tokens: those whose score is above the knee of the falling curve of all scores."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Compare = Literal["ge", "gt"]
STRAIGHT = 1e-6
"""A curve that bends less than this part of its fall has no knee."""


class Knee(NamedTuple):
    place: int
    """Which of the descending scores it is."""
    threshold: float
    """The score there."""
    bend: float
    """Its distance from the straight line, as a part of the curve's fall: 0 (straight) to 1 (one step)."""


class CoreTokens(NamedTuple):
    kept: Tensor
    """bool ``[n]``"""
    knee: Knee


def knee(scores: Tensor) -> Knee:
    """The point of the descending ``scores [n]`` that is farthest from the line through the first and the last.

    Of equal distances the first wins; whether they are measured vertically or at a right angle to the line is one constant
    factor. Exact for whole numbers. Of one, two or equal scores it is the first. Raises `ValueError` for none.
    """
    n = len(scores)
    if not n:
        raise ValueError("no scores, so no knee")
    ordered = scores.double().sort(descending=True).values
    fall = float(ordered[0] - ordered[-1])
    if n < 3 or not fall:
        return Knee(0, float(ordered[0]), 0.0)
    # n - 1 times the vertical distance: products and sums of whole numbers alone, so that ties are ties.
    distance = ((ordered - ordered[0]) * (n - 1) + fall * torch.arange(n, device=scores.device)).abs()
    place = int(distance.argmax())
    return Knee(place, float(ordered[place]), float(distance[place]) / (n - 1) / fall)


def core_tokens(scores: Tensor, compare: Compare = "ge", min_keep: int = 1) -> CoreTokens:
    """Which of ``scores [n]`` are at least (``ge``) or above (``gt``) the knee's.

    All of them when the curve is straight or flat: then no point of it is a knee. When fewer than `min_keep` would be left it
    is the `min_keep` best, earlier ones first among equals. Raises `ValueError` for no scores.
    """
    found = knee(scores)
    kept = scores >= found.threshold if compare == "ge" else scores > found.threshold
    if found.bend <= STRAIGHT:
        kept = torch.ones_like(kept)
    elif int(kept.sum()) < min_keep:
        kept = torch.zeros_like(kept)
        kept[scores.argsort(descending=True, stable=True)[:min_keep]] = True
    return CoreTokens(kept, found)
