"""The meaning: Turbo's layer rule token by token and sample by sample, attention with every score written down.

Slow and plain on purpose; what is fast is compared with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Merged(NamedTuple):
    x: Tensor
    """``[n - r, C]``"""
    mass: Tensor
    """``[n - r]``"""
    groups: list[list[int]]
    """For every token left: the tokens that it now stands for, itself first."""


def attention(q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``q, k, v [G, H, n, D]``, mass ``[G, n]``: (output ``[G, H, n, D]``, probabilities ``[G, H, n, n]``)."""
    logits = q @ k.transpose(-1, -2) * scale
    if mass is not None:
        logits = logits + mass.log()[:, None, None, :]  # on keys alone
    probabilities = logits.softmax(-1)
    return probabilities @ v, probabilities


def metric(keys: Tensor) -> Tensor:
    """``[H, n, d]`` to ``[n, d]``: heads are averaged first, then normalised."""
    mean = keys.mean(0)
    return mean / mean.norm(dim=-1, keepdim=True)


def importance(probabilities: Tensor, *, class_token: bool) -> Tensor:
    """``[H, n, n]`` to ``[n]``: the class token's row where there is one, as published, else the mean of the columns."""
    mean = probabilities.mean(0)
    return mean[0] if class_token else mean.mean(0)


def merge_layer(
    x: Tensor, mass: Tensor, h: Tensor, a: Tensor, r: int, *, weight: float, class_token: bool = False
) -> Merged:
    """``x [n, C]``, ``mass [n]``, metric ``h [n, d]``, importance ``a [n]``: one sample through one layer's merging."""
    n = len(x)
    first, second = list(range(0, n, 2)), list(range(1, n, 2))  # by parity of the current position
    scored = []
    for i in first:
        similar = [float(h[i] @ h[j]) for j in second]
        best = max(similar, default=float("-inf"))
        score = best - weight * float(a[i])
        if class_token and i == 0:
            score = float("-inf")
        scored.append((score, i, second[similar.index(best)] if second else i))
    scored.sort(key=lambda entry: -entry[0])  # stable: of equal scores the earlier token goes first
    r = min(r, (n - int(class_token)) // 2)
    merged, left = scored[:r], [i for _, i, _ in scored[r:]]
    if class_token:
        left.sort()
    total, sums = mass.clone(), x * mass[:, None]
    groups = {i: [i] for i in range(n)}
    for _, i, j in merged:
        total[j] += mass[i]
        sums[j] += x[i] * mass[i]
        groups[j].append(i)
    keep = left + second
    return Merged(sums[keep] / total[keep, None], total[keep], [groups[i] for i in keep])


def keep_most_attended(probabilities: Tensor, n: int, *, first_query: bool = False) -> Tensor:
    """Text-side reduction: the `n` visual keys of ``[H, text, visual]`` that heads and queries attend to most, sorted."""
    summed = (probabilities[:, :1] if first_query else probabilities).sum((0, 1))
    return torch.argsort(summed, descending=True, stable=True)[:n].sort().values
