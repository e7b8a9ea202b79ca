"""One layer's attention under MMInference on a GPU: heads of all patterns in one launch, each key head read in place.

Only heads whose modalities are not kept apart; Q- and 2D-boundary go group by group, each part a launch of its own. Indices
are made on the device, one key head's queries at a time, and nothing is asked of it before the launch; what the trace wants
(pairs, strides, recall) is counted behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from vlmbench.kernels.a_shape import seen as a_shape_seen
from vlmbench.kernels.a_shape import visible as a_shape_visible
from vlmbench.kernels.calls import LAST
from vlmbench.kernels.grid import Grid
from vlmbench.kernels.grid import seen as grid_seen
from vlmbench.kernels.grid import visible as grid_visible
from vlmbench.kernels.sparse_lines import Pattern, Refused, Table, attended, warn
from vlmbench.mm_attention import PROBED, Group, Layer, Part
from vlmbench.mm_patterns import Head, Scene

Counted = Callable[[], Tensor]
"""Notes what the heads did, and gives their pairs, 0-d: only called behind the launch."""


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

    ``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``. None, and all groups, when the kernel refuses, after a `SlowPath` warning.
    """
    left = {head: numbers for head, numbers in groups.items() if head.inter not in ("none", "k")}
    if len(left) == len(groups):
        return None, left
    shared = q.shape[1] // k.shape[1]
    patterns: list[tuple[Tensor, Pattern]] = []
    counts: list[Counted] = []
    own = Layer()
    for head, numbers in groups.items():
        if head in left:  # no keys now, and its own output later
            patterns.append((_numbers(numbers, q.device), Pattern()))
            continue
        for key_head in sorted({number // shared for number in numbers}):
            which = _numbers([number for number in numbers if number // shared == key_head], q.device)
            planned = _Planned(head, which, scene, scale, own, probe)
            keys = k[:, key_head : key_head + 1]
            patterns.append((which, planned.pattern(q[:, :, -LAST:][:, which], keys)))
            counts.append(planned.count)
    try:
        table = Table.of(patterns, q.shape[0], q.shape[2], q.device)
        out = attended(q, k, v, table, scale=scale).out
    except Refused as refused:
        warn(refused)
        return None, dict(groups)
    own.tally.launched(int(torch.stack([count() for count in counts]).sum()))
    layer.tally.scores += own.tally.scores
    layer.tally.launched(own.tally.pairs)
    layer.allowed += own.tally.pairs
    layer.recalls += own.recalls
    layer.strides += own.strides
    layer.rules += own.rules
    return out, left


class _Planned(Group):
    """Heads of one pattern and one key head: what they will see, before anything is computed."""

    count: Counted

    def pattern(self, q: Tensor, k: Tensor) -> Pattern:
        """``q [B, h, L, D]``, the last queries, and ``k [B, 1, N, D]``."""
        intra, n = self.head.vision, k.shape[2]
        part = Part(*self.scene.vision, n, LAST)
        shape = torch.Size(q.shape[:2])
        every = torch.arange(n, device=q.device)
        if intra.kind == "dense":
            self.count = lambda: self._window(n, n, 0, 0, shape, every)
            return Pattern(local=n)
        weights = self._weights(q, k, intra, part)
        if intra.kind in ("a_shape", "tri"):
            tail = n - part.stop if intra.kind == "tri" else 0

            def window() -> Tensor:
                self._recall(weights, lambda rows: a_shape_visible(rows, n, sink=intra.sink, local=intra.local))
                return self._window(n, intra.local, intra.sink, tail, shape, every)

            self.count = window
            return Pattern(intra.sink, intra.local, n - tail)
        if intra.kind == "vs":
            index = self.index(weights, intra, n)
            weights = _probed(weights)

            def indexed() -> Tensor:
                self.layer.rules.append((self.numbers, index.visible))
                self._recall(weights, index.visible)
                return index.seen(every).sum()

            self.count = indexed
            return Pattern(index=index)
        start, stop, stride, phase = self.lines(weights, intra, part, n)
        weights = _probed(weights)
        flags = (intra.horizontal, intra.vertical, intra.slash)
        self.count = lambda: self._lines(
            weights, Grid(start, intra.local, start, stop, 1, *flags), stride, phase, every
        )
        return Pattern(start, intra.local, stop, start, stop, self.scene.strides(intra.stride), stride, phase, *flags)

    def _window(self, n: int, local: int, sink: int, tail: int, heads: torch.Size, every: Tensor) -> Tensor:
        sizes = {"sink": sink, "local": local, "tail": tail}
        self.layer.rules.append((self.numbers, lambda rows: a_shape_visible(rows, n, **sizes).expand(*heads, -1, -1)))
        return a_shape_seen(every, n, **sizes).sum() * heads.numel()

    def _lines(self, weights: Tensor, grid: Grid, stride: Tensor, phase: Tensor, every: Tensor) -> Tensor:
        """Heads of one stride share a rule."""
        n = len(every)
        self.layer.strides += stride.flatten().tolist()
        pairs = torch.zeros((), dtype=torch.long, device=every.device)
        for each in stride.unique().tolist():
            for b in range(len(stride)):
                which = (stride[b] == each).nonzero()[:, 0]
                if not len(which):
                    continue
                sizes = (grid.sink, grid.local, grid.start)
                flags = (grid.horizontal, grid.vertical, grid.slash)
                lines, at = Grid(*sizes, grid.stop, each, *flags), phase[b : b + 1, which]
                self.layer.rules.append((self.numbers[which], partial(_visible, lines, at, n)))
                pairs += grid_seen(lines, at, every, n).sum()
                # Without the dense rows behind the lines: how good the lines are.
                open_end = Grid(*sizes, max(grid.start, n), each, *flags)
                self._recall(weights[b : b + 1, which], partial(_visible, open_end, at, n))
        return pairs


def _probed(weights: Tensor) -> Tensor:
    """What the recall asks about: all rows are 2 GB a key head at a million tokens, and would be held until the launch."""
    return weights[:, :, -PROBED:].clone()


def _numbers(numbers: list[int], device: torch.device) -> Tensor:
    """Without waiting for what the device has to do, as a copy that blocks does."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def _visible(grid: Grid, phase: Tensor, length: int, rows: Tensor) -> Tensor:
    return grid_visible(grid, phase, rows, length)
