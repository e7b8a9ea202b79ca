"""One layer's attention under MMInference on a GPU: heads of all patterns in one launch, each key head read in place.

Only heads whose modalities are not kept apart; Q- and 2D-boundary go group by group, each part a launch of its own. Indices
are made on the device from sums of the last queries' attention, and nothing is asked of it: what the trace wants (pairs,
strides, recall) is counted by `Layer.settle`, from indices and a few numbers a head that are all a layer leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.a_shape import seen as a_shape_seen
from vlmbench.kernels.a_shape import visible as a_shape_visible
from vlmbench.kernels.calls import LAST
from vlmbench.kernels.grid import Grid
from vlmbench.kernels.grid import seen as grid_seen
from vlmbench.kernels.grid import visible as grid_visible
from vlmbench.kernels.last_queries import Sums
from vlmbench.kernels.last_queries import fused as last_queries
from vlmbench.kernels.sparse_lines import Pattern, Refused, Table, attended, warn
from vlmbench.kernels.vertical_slash import Index
from vlmbench.mm_attention import PROBED, Group, Layer, Part
from vlmbench.mm_patterns import Head, Scene


class Planned(NamedTuple):
    """Heads of one pattern, before anything is computed."""

    numbers: Tensor
    """int64 ``[h]``"""
    pattern: Pattern
    pairs: Callable[[], int]
    """Counts their pairs, and notes their strides and rules; waits for the device."""
    open_end: Pattern | None = None
    """What the recall is about, if not the pattern: it without the dense rows at the end, and without horizontal lines."""
    on_line: Callable[[Tensor], Tensor] | None = None
    """Which of the rows ``[r]`` are such a line, boolean ``[B, h, r]``."""


def together(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Mapping[Head, list[int]],
    scene: Scene,
    scale: float,
    layer: Layer,
    probe: bool,
) -> tuple[Tensor | None, dict[Head, list[int]]]:
    """The output of the heads that one launch takes, ``[B, H, N, D]``, and the groups that are left to do.

    ``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``. What waits for the device is left to `layer`. None, and all groups, when a
    kernel refuses, after a `SlowPath` warning.
    """
    left = {head: numbers for head, numbers in groups.items() if head.inter not in ("none", "k")}
    if len(left) == len(groups):
        return None, left
    own = Layer()
    plans: list[Planned] = []
    share = None
    try:
        asking = {head: numbers for head, numbers in groups.items() if head not in left and _asks(head, probe)}
        every, found = _estimated(q[:, :, -LAST:], k, asking, scale, own)
        for head, numbers in groups.items():
            which = _numbers(numbers, q.device)
            if head in left:  # no keys now, and its own output later
                plans.append(Planned(which, Pattern(), lambda: 0))
            else:
                blank = every.new_empty(len(q), len(numbers), 0)
                seen = found.get(head, Sums(blank, blank))
                plans.append(_Heads(head, which, scene, scale, own, probe).planned(seen))
        table = Table.of([each[:2] for each in plans], q.shape[0], q.shape[2], q.device)
        out, lse = attended(q, k, v, table, scale=scale)
        if probe and asking:
            share = _kept(q, k, v, plans, every[..., -PROBED:], lse[..., -PROBED:], scale)
    except Refused as refused:
        warn(refused)
        return None, dict(groups)

    def count() -> None:
        pairs = sum(each.pairs() for each in plans)
        layer.tally.launched(pairs)
        layer.allowed += pairs
        layer.strides += own.strides
        layer.rules += own.rules
        if share is not None:
            kept = share()
            layer.recalls += [kept[:, numbers].flatten() for numbers in asking.values()]

    layer.tally.scores += own.tally.scores
    layer.later.append(count)
    return out, left


def _asks(head: Head, probe: bool) -> bool:
    """Whether it needs to know what the last queries attend to: for an index, or for the recall."""
    return head.vision.online or (probe and head.vision.kind != "dense")


def _estimated(
    q: Tensor, k: Tensor, asking: Mapping[Head, list[int]], scale: float, layer: Layer
) -> tuple[Tensor, dict[Head, Sums]]:
    """Log-sum-exps ``[B, H, L]`` of the last queries ``q [B, H, L, D]``, +inf of heads that do not ask, and sums of the others.

    A launch for all log-sum-exps, one for heads that need columns alone, and one for those that need diagonals too.
    """
    rows, n = q.shape[2], k.shape[2]
    every = torch.full(q.shape[:3], float("inf"), device=q.device)
    found: dict[Head, Sums] = {}
    if not asking:
        return every, found
    which = _numbers([number for numbers in asking.values() for number in numbers], q.device)
    every[:, which] = last_queries.log_sum_exp(q, k, which, scale=scale)
    for head, numbers in asking.items():
        used = rows if head.vision.online else min(PROBED, rows)
        layer.tally.scores += len(q) * len(numbers) * (used * (n - used) + used * (used + 1) // 2)
    for kind in ("grid", "vs"):
        heads = [head for head in asking if head.vision.online and head.vision.kind == kind]
        if not heads:
            continue
        which = _numbers([number for head in heads for number in asking[head]], q.device)
        seen = last_queries.sums(q, k, which, every[:, which], diagonals=kind == "vs", scale=scale)
        sizes = [len(asking[head]) for head in heads]
        for head, columns, diagonals in zip(heads, *(x.split(sizes, 1) for x in seen), strict=True):
            found[head] = Sums(columns, diagonals)
    return every, found


def _kept(
    q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Planned], every: Tensor, own: Tensor, scale: float
) -> Callable[[], Tensor]:
    """Gives ``[B, H]``: which share of the last queries' attention is on keys that are kept, on average.

    It is the quotient of what their softmax sums up to with the pattern (`own`) and without (`every`), both logarithms
    ``[B, H, r]``. For open ends one small launch more has these rows alone.
    """
    n, rows = q.shape[2], every.shape[2]
    kept = own.clone()  # of a slice all rows would be held
    if any(each.open_end for each in plans):
        patterns = [(each.numbers, each.open_end or Pattern()) for each in plans]
        table = Table.of(patterns, len(q), rows, q.device, shift=n - rows)
        opened = attended(q[:, :, -rows:], k, v, table, scale=scale).lse
        for each in plans:
            if each.open_end:
                kept[:, each.numbers] = opened[:, each.numbers]
    every = every.clone()

    def share() -> Tensor:
        found = (kept - every).exp().clamp(max=1)  # roundings may come to a little more
        last = torch.arange(n - rows, n, device=found.device)
        for each in plans:
            if each.on_line is not None:
                found[:, each.numbers] = found[:, each.numbers].masked_fill(each.on_line(last), 1)
        return found.mean(-1)

    return share


class _Heads(Group):
    """Heads of one pattern, of any key heads."""

    def planned(self, found: Sums) -> Planned:
        """`found` is what an index comes from, ``[B, h, 0]`` where there is none."""
        intra, n = self.head.vision, self.scene.length
        part = Part(*self.scene.vision, n, LAST)
        shape = found.columns.shape[:2]
        if intra.kind == "dense":
            return Planned(self.numbers, Pattern(local=n), lambda: self._window(n, n, 0, 0, shape))
        if intra.kind in ("a_shape", "tri"):
            tail = n - part.stop if intra.kind == "tri" else 0
            return Planned(
                self.numbers,
                Pattern(intra.sink, intra.local, n - tail),
                lambda: self._window(n, intra.local, intra.sink, tail, shape),
                Pattern(intra.sink, intra.local) if tail else None,
            )
        if intra.kind == "vs":
            index = self.index(found, intra, n)
            return Planned(self.numbers, Pattern(index=index), lambda: self._indexed(index))
        start, stop, stride, phase = self.lines(found.columns / min(LAST, n), intra, part, n)
        grid = Grid(start, intra.local, start, stop, 1, intra.horizontal, intra.vertical, intra.slash)
        strides = self.scene.strides(intra.stride)
        sizes, end, flags = (start, intra.local), max(start, n), (intra.vertical, intra.slash)
        return Planned(
            self.numbers,
            Pattern(*sizes, stop, start, stop, strides, stride, phase, intra.horizontal, *flags),
            lambda: self._lines(grid, stride, phase),
            Pattern(*sizes, None, start, end, strides, stride, phase, False, *flags),
            partial(_on_line, start, stride, phase) if intra.horizontal else None,
        )

    def _window(self, n: int, local: int, sink: int, tail: int, heads: torch.Size) -> int:
        sizes = {"sink": sink, "local": local, "tail": tail}
        self.layer.rules.append((self.numbers, lambda rows: a_shape_visible(rows, n, **sizes).expand(*heads, -1, -1)))
        return int(a_shape_seen(torch.arange(n), n, **sizes).sum()) * heads.numel()

    def _indexed(self, index: Index) -> int:
        self.layer.rules.append((self.numbers, index.visible))
        return int(index.seen(torch.arange(index.length, device=self.numbers.device)).sum())

    def _lines(self, grid: Grid, stride: Tensor, phase: Tensor) -> int:
        """Heads of one stride share a rule."""
        n = self.scene.length
        every = torch.arange(n, device=stride.device)
        self.layer.strides += stride.flatten().tolist()
        pairs = 0
        for each in stride.unique().tolist():
            for b in range(len(stride)):
                which = (stride[b] == each).nonzero()[:, 0]
                if not len(which):
                    continue
                lines, at = replace(grid, stride=each), phase[b : b + 1, which]
                self.layer.rules.append((self.numbers[which], partial(_visible, lines, at, n)))
                pairs += int(grid_seen(lines, at, every, n).sum())
        return pairs


def _numbers(numbers: list[int], device: torch.device) -> Tensor:
    """Without waiting for what the device has to do, as a copy that blocks does."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def _on_line(start: int, stride: Tensor, phase: Tensor, rows: Tensor) -> Tensor:
    behind = rows - start
    return (behind >= 0) & ((behind - phase[..., None]) % stride[..., None] == 0)


def _visible(grid: Grid, phase: Tensor, length: int, rows: Tensor) -> Tensor:
    return grid_visible(grid, phase, rows, length)
