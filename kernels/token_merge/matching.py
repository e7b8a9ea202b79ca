"""Matching and merging in batches, with shapes that depend on sizes alone: no branch on data, no copy to the host.

A merge is a product with a 0-1 matrix instead of a scatter: the same bits every time on a GPU too, and rows that take part
in no merge come out as they went in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmbench.kernels.token_merge.schedule import cap


class Decision(NamedTuple):
    """Who merges into whom, in ``G`` groups of n tokens, r of each merged. All int64."""

    keep: Tensor
    """``[G, n - r]``: the old position of every token left, in the new order."""
    source: Tensor
    """``[G, r]``: old positions of the merged."""
    into: Tensor
    """``[G, n]``: the new position of every old token; of a merged one, that of the token it went into."""


class Folded(NamedTuple):
    """What repeated passes leave."""

    x: Tensor
    mass: Tensor
    keep: Tensor
    into: Tensor


def unit_metric(keys: Tensor) -> Tensor:
    """``[..., q, H, d]`` to ``[..., d]``: mean over the rows of a unit and over heads, then normalised, at least float32."""
    return normalize(_at_least_float(keys).mean((-3, -2)), dim=-1)


def match(
    metric: Tensor,
    importance: Tensor | None,
    r: int,
    *,
    weight: float = 0.0,
    class_token: bool = False,
    redundancy: bool = True,
    frames: int = 1,
) -> Decision:
    """The r of the even positions that are most alike an odd one and least important.

    metric ``[G, n, d]`` normalised, importance ``[G, n]``. `weight` is α·c·β^|γ - l|; 0 is ToMe. `redundancy` false ranks by
    importance alone. `frames` above 1: groups come frame by frame, and groups of the same place decide alike, by their mean
    scores. Where a token goes depends on similarity alone. Raises `ValueError` when r is above `cap`, or importance is needed
    and not there.
    """
    groups, n, _ = metric.shape
    if r > cap(n, class_token):
        raise ValueError(f"one matching of {n} tokens can merge at most {cap(n, class_token)}, not {r}")
    if importance is None and (weight or not redundancy):
        raise ValueError("a weight above 0, or a ranking by importance alone, needs the importance of every token")
    positions = torch.arange(n, device=metric.device)
    if r == 0:
        whole = positions.expand(groups, n)
        return Decision(whole, whole[:, :0], whole)
    similar = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)  # [G, even, odd]
    even = None if importance is None else importance[:, ::2]
    if frames > 1:
        similar = _mean_over_frames(similar, frames)
        even = None if even is None else _mean_over_frames(even, frames)
    best, partner = similar.max(-1)  # the penalty is constant along a row: it comes after the maximum
    score = best if redundancy else torch.zeros_like(best)
    if even is not None:
        score = score - (weight if redundancy else 1.0) * even
    if class_token:
        score = torch.where(positions[: best.shape[1]] == 0, float("-inf"), score)
    order = score.argsort(dim=-1, descending=True, stable=True)
    merged, left = order[:, :r], order[:, r:]
    if class_token:
        left = left.sort(-1).values  # index 0 first: the class token stays where the model looks for it
    odd = positions[1::2].expand(groups, -1)
    n_left = left.shape[1]
    rank = torch.empty_like(order)
    rank.scatter_(1, left, positions[:n_left].expand(groups, -1))
    rank.scatter_(1, merged, n_left + partner.gather(1, merged))
    into = torch.stack([rank[:, : odd.shape[1]], positions[n_left : n_left + odd.shape[1]].expand(groups, -1)], -1)
    into = torch.cat(
        [into.flatten(1), rank[:, odd.shape[1] :]], 1
    )  # an odd number of tokens ends with an even position
    return Decision(torch.cat([2 * left, odd], 1), 2 * merged, into)


def merge(x: Tensor, mass: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
    """Mass-weighted means ``[G, n - r, C]`` and masses ``[G, n - r]`` of ``x [G, n, C]``, ``mass [G, n]``.

    Written as the old value plus a shift, so that equal tokens give exactly that token. Half-precision values are averaged in
    float32.
    """
    keep, source, into = decision
    kept, kept_mass = x.gather(1, _rows(keep, x)), mass.gather(1, keep)
    if not source.shape[1]:
        return kept, kept_mass
    odd = x.shape[1] // 2
    first = keep.shape[1] - odd  # destinations are odd positions, which are the last
    target = into.gather(1, source) - first
    hot = (torch.arange(odd, device=x.device)[:, None] == target[:, None, :]).to(mass.dtype)  # [G, odd, r]
    moved = mass.gather(1, source)
    own = _at_least_float(kept[:, first:])
    difference = _at_least_float(x.gather(1, _rows(source, x))) - own.gather(1, _rows(target, x))
    total = kept_mass[:, first:] + (hot @ moved[..., None])[..., 0]
    shift = hot.to(own.dtype) @ (difference * moved[..., None].to(own.dtype)) / total[..., None].to(own.dtype)
    return (
        torch.cat([kept[:, :first], (own + shift).to(x.dtype)], 1),
        torch.cat([kept_mass[:, :first], total], 1),
    )


def unmerge(x: Tensor, into: Tensor) -> Tensor:
    """``[G, n, C]``: every old token takes the value of the token it went into."""
    return x.gather(1, _rows(into, x))


def fold(
    x: Tensor,
    mass: Tensor,
    metric: Tensor,
    importance: Tensor | None,
    remove: int,
    *,
    weight: float = 0.0,
    class_token: bool = False,
    redundancy: bool = True,
    frames: int = 1,
) -> Folded:
    """FOLDER (arXiv 2501.02430): `remove` tokens of each group at one place, by as many passes as that takes.

    Between passes metric and importance are averaged by mass. Raises `ValueError` when not one token would be left.
    """
    groups, n, _ = x.shape
    if remove > n - 1 - class_token:
        raise ValueError(f"{n} tokens cannot lose {remove}: one at least must be left")
    keep = into = torch.arange(n, device=x.device).expand(groups, n)
    while remove and (r := min(remove, cap(keep.shape[1], class_token))):
        found = match(
            metric, importance, r, weight=weight, class_token=class_token, redundancy=redundancy, frames=frames
        )
        metric = normalize(merge(metric, mass, found)[0], dim=-1)
        if importance is not None:
            importance = merge(importance[..., None], mass, found)[0][..., 0]
        x, mass = merge(x, mass, found)
        keep, into = keep.gather(1, found.keep), found.into.gather(1, into)
        remove -= r
    return Folded(x, mass, keep, into)


def _mean_over_frames(values: Tensor, frames: int) -> Tensor:
    """``[F·W, ...]``: the mean over F, for each of the F again."""
    by_frame = values.unflatten(0, (frames, -1))
    return by_frame.mean(0, keepdim=True).expand_as(by_frame).flatten(0, 1)


def _rows(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, x.shape[-1])


def _at_least_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
