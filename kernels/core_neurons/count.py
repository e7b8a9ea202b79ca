"""Core neurons and co-activation without sorting activations: one threshold a token, then comparisons and sums."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 512
"""Tokens at a time: bounds what comparisons of a long prompt write to ``ROWS · D`` entries."""


class Counts(NamedTuple):
    """What a prompt says of every neuron of one layer, each ``[D]``."""

    frequency: Tensor
    """int32: in how many tokens the neuron is a core neuron."""
    activation: Tensor
    """float32: its positive activations, summed over tokens."""


def core_counts(activations: Tensor, rho: float) -> Counts:
    """Counts of ``activations [M, D]``, the vectors that enter the down projection.

    A token's core neurons are the top `rho`, in (0, 1], of its positive entries by value: ``ceil(rho · p)`` of p, and with them
    whatever equals the smallest (CoreInfer, arXiv 2410.18311, section 3.1). A token without a positive entry has none.
    """
    if activations.device.type != "cpu":
        from vlmbench.kernels.core_neurons import fused

        if fused.refusal(activations) is None:
            return fused.core_counts(activations, rho)
    n = activations.shape[1]
    frequency = torch.zeros(n, dtype=torch.int32, device=activations.device)
    activation = torch.zeros(n, dtype=torch.float32, device=activations.device)
    for rows in activations.split(ROWS):
        frequency += (rows >= _least_core(rows, rho)[:, None]).sum(0, dtype=torch.int32)
        activation += rows.clamp(min=0).sum(0, dtype=torch.float32)
    return Counts(frequency, activation)


def _least_core(rows: Tensor, rho: float) -> Tensor:
    """The smallest core activation of every row ``[m]``; infinity where none is positive."""
    positive = (rows > 0).sum(1, dtype=torch.int32)
    many = wanted(positive, rho)
    # No row can want more than this; asking how many the greediest wants would stop the device at every layer.
    most = math.ceil(rho * rows.shape[1])
    least = quickselect(rows, many) if rows.device.type == "cpu" else by_topk(rows, many, most)
    return torch.where(positive > 0, least, torch.inf)


def wanted(positive: Tensor, rho: float) -> Tensor:
    """How many of so many `positive` entries are core, int64: the fraction `rho`, rounded up, and at least 1."""
    return (positive.double() * rho - 1e-9).ceil().long().clamp(min=1)  # 0.07 · 100 is above 7 in binary


def by_topk(rows: Tensor, wanted: Tensor, most: int) -> Tensor:
    """The ``wanted[i]``-th largest entry of row i of ``[m, D]``, none of them above `most`."""
    return rows.topk(most, dim=1).values.gather(1, wanted[:, None] - 1)[:, 0]


def quickselect(rows: Tensor, wanted: Tensor) -> Tensor:
    """The same on a CPU, where `topk` takes many times as long: it sorts what it selects."""
    import numpy as np

    n = rows.shape[1]
    values = rows.float().numpy()  # bfloat16 is unknown there; float32 holds it exactly
    places = [n - k for k in wanted.tolist()]
    found = [np.partition(row, place)[place] for row, place in zip(values, places, strict=True)]
    return torch.tensor(np.array(found), dtype=rows.dtype)


def n_core(beta: float, neurons: int) -> int:
    """How many of a layer's neurons the fraction `beta` keeps: ``int(beta · D)``, 0.29 · 100 being 29."""
    return int(beta * neurons + 1e-9)


def core_set(counts: Counts, n: int) -> Tensor:
    """The `n` core neurons of a layer, ascending int64 ``[n]``.

    Highest frequency first, then highest summed positive activation, then lowest index. So a larger `n` only adds.
    """
    order = counts.activation.argsort(descending=True, stable=True)
    order = order[counts.frequency[order].argsort(descending=True, stable=True)]
    return order[:n].sort().values


def co_activation(activations: Tensor, neurons: Tensor) -> Tensor:
    """How many of the core `neurons`, int64 ``[K]``, are positive in each token of ``activations [M, D]``: int32 ``[M]``.

    In the paper's words ``|Γ(m) ∩ C|``; Γ(m) are all positive neurons of token m, not only its strongest.
    """
    parts = [(rows.index_select(1, neurons) > 0).sum(1, dtype=torch.int32) for rows in activations.split(ROWS)]
    return torch.cat(parts)
