"""Attention over tokens that stand for several, and the importance of each token, read off the same pass.

"Proportional attention" adds log(mass) to the logits of a key, for all queries and heads alike: as if the token were there
as often as it has mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

Importance = Literal["class", "column"]
Dense = Callable[[Tensor, Tensor, Tensor], Tensor]

SCORES = 1 << 26
"""Most attention probabilities that are written down at once."""


class Attended(NamedTuple):
    out: Tensor
    """``[G, H, n, D]``"""
    importance: Tensor | None
    """``[G, n]`` in float32 or more, summing to 1; None unless asked for."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    log_mass: Tensor | None = None,
    importance: Importance | None = None,
    dense: Dense | None = None,
) -> Attended:
    """``q, k, v [G, H, n, D]``, log_mass ``[G, n]``; every token sees all of its group.

    ``importance="class"`` is the first query's row, as published; ``"column"`` the mean of every column, for towers without a
    class token. `dense` computes attention without mass, SDPA by default. No n × n matrix is kept but for ``"column"``, and
    then for few groups at a time.
    """
    if importance == "column":
        return _explicit(q, k, v, scale, log_mass)
    row = _class_row(q, k, scale, log_mass) if importance == "class" else None
    if log_mass is None or (q.is_meta and dense):  # without data only sizes count, and the mass changes none
        return Attended(dense(q, k, v) if dense else scaled_dot_product_attention(q, k, v, scale=scale), row)
    if q.device.type == "cuda":
        return Attended(augmented(q, k, v, scale, log_mass), row)
    mask = log_mass[:, None, None, :].to(q.dtype)
    return Attended(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), row)


def augmented(q: Tensor, k: Tensor, v: Tensor, scale: float, log_mass: Tensor) -> Tensor:
    """The same without a mask, which flash kernels do not take: log(mass) rides in further features of q and k.

    q gets a power of two p, k gets log(mass) / (scale · p): their product times the scale is log(mass). It is written as two
    numbers of the dtype, high and low part, since 8 bits would leave it wrong by up to a percent. Features are padded to a
    multiple of 8, those of v too, since kernels want one size for all.
    """
    d = q.shape[-1]
    power = 2.0 ** round(math.log2(1 / scale))
    wanted = log_mass / (scale * power)
    high = wanted.to(k.dtype)
    low = (wanted - high).to(k.dtype)
    features = torch.stack([high, low], -1)[:, None].expand(-1, k.shape[1], -1, -1)
    more = -(d + 2) % 8
    q = pad(pad(q, (0, 2), value=power), (0, more))
    k = pad(torch.cat([k, features], -1), (0, more))
    return scaled_dot_product_attention(q, k, pad(v, (0, 2 + more)), scale=scale)[..., :d]


def _class_row(q: Tensor, k: Tensor, scale: float, log_mass: Tensor | None) -> Tensor:
    """``[G, n]``: what the first token attends to, mean over heads, after the mass."""
    logits = (q[:, :, :1] @ k.transpose(-1, -2))[:, :, 0] * scale  # [G, H, n]
    return _softmax(logits if log_mass is None else logits + log_mass[:, None].to(logits.dtype)).mean(1)


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, log_mass: Tensor | None) -> Attended:
    groups, heads, n, _ = q.shape
    at_once = max(1, SCORES // (heads * n * n))
    outs, columns = [], []
    for start in range(0, groups, at_once):
        part = slice(start, start + at_once)
        logits = q[part] @ k[part].transpose(-1, -2) * scale  # [g, H, n, n]
        if log_mass is not None:
            logits = logits + log_mass[part, None, None].to(logits.dtype)
        probabilities = _softmax(logits)
        outs.append(probabilities.to(v.dtype) @ v[part])
        columns.append(probabilities.mean((1, 2)))
    return Attended(torch.cat(outs), torch.cat(columns))


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
