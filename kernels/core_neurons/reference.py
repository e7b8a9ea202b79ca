"""The meaning of core neurons, co-activation, knee and sparse FFN: loops over tokens and points, nothing clever."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def core_counts(activations: Tensor, rho: float) -> list[int]:
    """f(n) of every neuron of ``activations [M, D]``: in how many tokens it is among the top `rho` of the positive ones.

    A token with p positive entries has ``ceil(rho · p)`` core neurons, and with them whatever equals the smallest.
    """
    counts = [0] * activations.shape[1]
    for row in activations.tolist():
        positive = sorted((value for value in row if value > 0), reverse=True)
        if positive:
            least = positive[math.ceil(round(rho * len(positive), 9)) - 1]
            counts = [count + (value >= least) for count, value in zip(counts, row, strict=True)]
    return counts


def core_set(activations: Tensor, rho: float, beta: float) -> list[int]:
    """The ``int(beta · D)`` neurons of highest f; then of highest summed positive activation; then of lowest index."""
    counts = core_counts(activations, rho)
    sums = activations.clamp(min=0).sum(0).tolist()
    order = sorted(range(len(counts)), key=lambda n: (-counts[n], -sums[n], n))
    return sorted(order[: int(round(beta * len(counts), 9))])


def co_activation(activations: Tensor, neurons: list[int]) -> list[int]:
    """c(m) of every token of ``activations [M, D]``: how many of `neurons` are positive in it."""
    return [sum(row[n] > 0 for n in neurons) for row in activations.tolist()]


def knee(scores: list[float]) -> int:
    """Index into the descending scores of the point farthest from the line through the first and the last.

    The distance is the perpendicular one, in a square of side 1 that the curve spans. Raises `ValueError` when all are equal.
    """
    ordered = sorted(scores, reverse=True)
    last, fall = len(ordered) - 1, ordered[0] - ordered[-1]
    if not fall:
        raise ValueError("all scores are equal, and a flat curve has no knee")
    points = [(i / last, (value - ordered[-1]) / fall) for i, value in enumerate(ordered)]  # from (0, 1) to (1, 0)
    distances = [abs(x + y - 1) / math.sqrt(2) for x, y in points]
    return max(range(len(points)), key=lambda i: (distances[i], -i))


def sparse_ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """The dense FFN of ``x [..., C]`` with every neuron outside `neurons` set to zero.

    ``gate, up [D, C]``, ``down [C, D]``, ``neurons`` int64 ``[K]``.
    """
    activations = act(x @ gate.T) * (x @ up.T)
    kept = torch.zeros(gate.shape[0], dtype=x.dtype, device=x.device)
    kept[neurons] = 1
    return (activations * kept) @ down.T
