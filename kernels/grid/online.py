"""Which stride and phase a head's lines have, from the attention of its last queries (MMInference, algorithm 1).

The paper leaves open how a stride's mass is scored. The sum over a phase class prefers divisors of the true stride, the mean
prefers multiples; here it is the sum, and of the strides within `MARGIN` of the best one the largest wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 0.02


class Found(NamedTuple):
    stride: Tensor
    """int64 ``[B, H]``"""
    phase: Tensor
    """int64 ``[B, H]``, counted from `start`."""
    mass: Tensor
    """``[B, H]``: share of the last queries' attention on the class, float32."""


def find_lines(weights: Tensor, strides: Sequence[int], *, start: int, stop: int, phase: int | None = None) -> Found:
    """`weights` ``[B, H, L, N]`` are softmax rows of the last queries; only the keys ``[start, stop)`` count.

    A `phase` that is given is taken for every stride (modulo it). Raises `ValueError` when there is no stride.
    """
    return lines_of(weights[..., start:stop].sum(-2) / weights.shape[-2], strides, phase=phase)


def lines_of(columns: Tensor, strides: Sequence[int], *, phase: int | None = None) -> Found:
    """As `find_lines`, from the share of the last queries' attention on each key that may hold a line, ``[B, H, keys]``."""
    if not strides or min(strides) < 1:
        raise ValueError(f"strides must be at least 1 and at least one must be given, not {list(strides)}")
    ordered = sorted(set(strides), reverse=True)
    phases, masses = [], []
    for stride in ordered:
        padded = functional.pad(columns, (0, -columns.shape[-1] % stride))
        folded = padded.unflatten(-1, (-1, stride)).sum(-2)  # [B, H, stride]
        if phase is not None:
            folded = folded[..., phase % stride, None]
        mass, at = folded.max(-1)
        phases.append(at if phase is None else torch.full_like(at, phase % stride))
        masses.append(mass)
    mass = torch.stack(masses)  # [strides, B, H], largest stride first
    near = mass >= (1 - MARGIN) * mass.amax(0)
    chosen = near.int().argmax(0, keepdim=True)  # the first, so the largest
    return Found(
        torch.tensor(ordered).to(columns.device, non_blocking=True)[chosen[0]],
        torch.stack(phases).gather(0, chosen)[0],
        mass.gather(0, chosen)[0],
    )
