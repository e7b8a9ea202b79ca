"""One layer's attention under MMInference: heads of one pattern together, each through the kernel that skips work.

A layer never loops over its heads: those that have the same pattern are one call, whatever their number, and what differs
from head to head (phase, columns, diagonals) is in index tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import floor, gcd, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.a_shape import a_shape
from vlmbench.kernels.a_shape import seen as a_shape_seen
from vlmbench.kernels.a_shape import visible as a_shape_visible
from vlmbench.kernels.calls import LAST, Tally, attend, last_weights
from vlmbench.kernels.grid import Grid, grid_attention, lines_of
from vlmbench.kernels.grid import seen as grid_seen
from vlmbench.kernels.grid import visible as grid_visible
from vlmbench.kernels.last_queries import Sums, sums
from vlmbench.kernels.sparse_lines import preferred
from vlmbench.kernels.vertical_slash import FIRST, NEAR, Index, index_of, vertical_slash
from vlmbench.mm_patterns import Head, Intra, Scene

Rule = Callable[[Tensor], Tensor]
PROBED = 8
"""Last queries on which the trace's recall is taken."""


@dataclass
class Layer:
    """What one layer did, for the trace and for counting."""

    tally: Tally = field(default_factory=Tally)
    recalls: list[Tensor] = field(default_factory=list)
    """Of each group of heads: share of the last queries' attention on the pairs that the pattern keeps."""
    strides: list[int] = field(default_factory=list)
    """Of every grid head."""
    rules: list[tuple[Tensor, Rule]] = field(default_factory=list)
    """Which heads, and for rows ``[r]`` which keys they see, ``[B, h, r, N]``; not under Q- and 2D-boundary."""
    allowed: int = 0
    """Query-key pairs that the patterns allow, over all heads; more are computed, in the corners of masks (`tally`)."""
    dense: int = 0
    """All pairs of the tokens that this layer saw, over all heads."""
    later: list[Callable[[], None]] = field(default_factory=list)
    """What is left to count, all of which would wait for the device: `settle`."""

    def settle(self) -> Layer:
        """Count what was put off. Until then pairs, strides, recalls and rules lack it."""
        waiting, self.later = self.later, []
        for count in waiting:
            count()
        return self

    @property
    def extra(self) -> int:
        """Pairs that were computed beside those that the patterns allow."""
        return max(0, self.tally.computed - self.allowed)


class Found(NamedTuple):
    """Attention of a group of heads."""

    out: Tensor
    """``[B, H, n, D]``"""
    lse: Tensor
    """``[B, H, n]``, float32."""
    seen: Tensor
    """int64 ``[B, H, n]``: how many keys each query saw."""


@dataclass(frozen=True)
class Part:
    """A sequence that a pattern runs on: the whole prompt, or one modality's tokens in order."""

    start: int
    """Lines lie in ``[start, stop)``."""
    stop: int
    asked: int
    """Its index comes from the last queries before this token."""
    last: int
    """How many of them at most."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Sequence[Head],
    scene: Scene,
    *,
    scale: float | None = None,
    probe: bool = True,
    dry: bool = False,
    settle: bool = True,
) -> tuple[Tensor, Layer]:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``, a pattern for each of the H heads, sizes in tokens of this prompt.

    Returns ``[B, H, N, D]``, heads behind tokens in memory. With `dry` indices are made and pairs counted, and the output
    holds nothing. Without `settle` what waits for a GPU is left to `Layer.settle`. Raises `ValueError` when the lengths are
    not the scene's, or for a dry Q- or 2D-boundary.
    """
    if {q.shape[2], k.shape[2]} != {scene.length}:
        raise ValueError(f"the prompt has {scene.length} tokens; q has {q.shape[2]} and k has {k.shape[2]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups: dict[Head, list[int]] = {}
    for number, head in enumerate(heads):
        groups.setdefault(head, []).append(number)
    layer = Layer(Tally(dry=dry))
    shared = q.shape[1] // k.shape[1]
    out = None
    if preferred(q.device) and not dry:
        from vlmbench.mm_fused import together

        out, groups = together(q, k, v, groups, scene, scale, layer, probe)
    if out is None:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for head, numbers in groups.items():
        which, theirs = _heads(numbers), key_heads(numbers, shared)
        group = Group(head, torch.tensor(numbers, device=q.device), scene, scale, layer, probe)
        found = group.attend(q[:, which], k[:, theirs], v[:, theirs])
        if len(numbers) == q.shape[1]:
            out = found.out
        elif not dry:
            out[:, which] = found.out
        layer.allowed += int(found.seen.sum())
    return out, layer.settle() if settle else layer


def _heads(numbers: Sequence[int]) -> slice | list[int]:
    """What picks these heads: a view where they stand together."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if list(numbers) == list(range(first, last + 1)) else list(numbers)


def key_heads(numbers: Sequence[int], shared: int) -> slice | list[int]:
    """The key heads of these query heads, `shared` of which read one in the model: as few as each serve equally many."""
    theirs = [number // shared for number in numbers]
    serve = gcd(*(len(list(same)) for _, same in groupby(theirs)))
    return _heads(theirs[::serve])


class Group:
    """Heads of one pattern: ``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``."""

    def __init__(self, head: Head, numbers: Tensor, scene: Scene, scale: float, layer: Layer, probe: bool) -> None:
        self.head, self.numbers, self.scene, self.scale = head, numbers, scene, scale
        self.layer, self.probe = layer, probe

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        scene = self.scene
        alone = all(run.vision for run in scene.runs)
        if alone or self.head.inter in (
            "none",
            "k",
        ):  # the pattern's columns and rows are those of the prompt either way
            return self.intra(q, k, v, self.head.vision, Part(*scene.vision, scene.length, LAST))
        if self.layer.tally.dry:
            raise ValueError("only patterns without a boundary are counted dry")
        from vlmbench.mm_boundary import by_pair, by_query

        return (by_query if self.head.inter == "q" else by_pair)(self, q, k, v)

    def intra(
        self, q: Tensor, k: Tensor, v: Tensor, intra: Intra, part: Part, row_blocks: Tensor | None = None
    ) -> Found:
        """A pattern on a whole sequence; rows from ``part.stop`` on are dense under `grid` and `tri`.

        `vs` may leave out all but some row blocks.
        """
        options: dict[str, Any] = {"scale": self.scale, "tally": self.layer.tally}
        n = q.shape[2]
        every = torch.arange(n, device=q.device)
        rules = self.layer.rules
        if intra.kind == "dense":
            rules.append((self.numbers, partial(_window, n, n, 0, 0, q.shape[:2])))
            return Found(*attend(q, k, v, causal=True, **options), (every + 1).expand(q.shape[:3]))
        weights = self._weights(q, k, intra, part)
        if self.layer.tally.dry:  # what follows only counts
            q, k, v = q[..., :1], k[..., :1], v[..., :1]
        if intra.kind in ("a_shape", "tri"):
            tail = n - part.stop if intra.kind == "tri" else 0
            self._recall(weights, lambda rows: a_shape_visible(rows, part.asked, sink=intra.sink, local=intra.local))
            rules.append((self.numbers, partial(_window, n, intra.local, intra.sink, tail, q.shape[:2])))
            options |= {"sink": intra.sink, "local": intra.local, "tail": tail}
            seen = a_shape_seen(every, n, sink=intra.sink, local=intra.local, tail=tail).expand(q.shape[:3])
            return Found(*a_shape(q, k, v, **options), seen)
        if intra.kind == "vs":
            index = self.index(sums(weights), intra, n)
            rules.append((self.numbers, index.visible))
            self._recall(weights, lambda rows: index.visible(rows)[..., : part.asked])
            return Found(*vertical_slash(q, k, v, index, row_blocks=row_blocks, **options), index.seen(every))
        return self._grid(q, k, v, intra, part, weights)

    def index(self, asked: Sums, intra: Intra, n: int) -> Index:
        """Of `n` tokens, from what the last queries see of the first of them; what is forced shrinks with the prompt."""
        shrink = self.scene.shrink
        index = index_of(
            asked,
            columns=intra.columns,
            slashes=intra.slashes,
            first=max(1, round(FIRST * shrink)),
            near=max(1, round(NEAR * shrink)),
            block=block_of(shrink),
        )
        more = -(-n // index.block) - index.diagonals.shape[2]
        return Index(index.columns, torch.nn.functional.pad(index.diagonals, (0, more)), index.block, n)

    def _weights(self, q: Tensor, k: Tensor, intra: Intra, part: Part) -> Tensor:
        """Softmax rows of the last queries: all that an index needs, or a few for the recall alone."""
        last = part.last if intra.online else min(part.last, PROBED if self.probe else 0)
        seen = slice(0, part.asked)
        return last_weights(q[:, :, seen], k[:, :, seen], scale=self.scale, tally=self.layer.tally, last=last)

    def _grid(self, q: Tensor, k: Tensor, v: Tensor, intra: Intra, part: Part, weights: Tensor) -> Found:
        """Each head on its own stride and phase; heads whose strides differ are separate calls, at most one a candidate."""
        heads, n = q.shape[1:3]
        start, stop, stride, phase = self.lines(weights.mean(-2), intra, part, n)
        self.layer.strides += stride.flatten().tolist()
        every = torch.arange(n, device=q.device)
        lines = {"horizontal": intra.horizontal, "vertical": intra.vertical, "slash": intra.slash}
        prompts = []
        for b, strides in enumerate(stride.tolist()):  # which heads have a stride differs from prompt to prompt
            parts = []
            for each in sorted(set(strides)):
                numbers = [number for number, own in enumerate(strides) if own == each]
                which, theirs = _heads(numbers), key_heads(numbers, heads // k.shape[1])
                rows, at = q[b : b + 1, which], phase[b : b + 1, which]
                keys, values = (x[b : b + 1, theirs] for x in (k, v))
                grid = Grid(start, intra.local, start, stop, each, **lines)
                done = grid_attention(rows, keys, values, grid, at, scale=self.scale, tally=self.layer.tally)
                parts.append((which, Found(*done, grid_seen(grid, at, every, n))))
                self.layer.rules.append((self.numbers[which], partial(_lines, grid, at, n)))
                if self.probe:  # without the dense rows behind the lines: how good the lines are
                    open_end = Grid(start, intra.local, start, max(start, part.asked), each, **lines)
                    self._recall(weights[b : b + 1, which], partial(_lines, open_end, at, part.asked))
            prompts.append(_joined(parts, heads))
        return prompts[0] if len(prompts) == 1 else Found(*(torch.cat(each) for each in zip(*prompts, strict=True)))

    def lines(self, columns: Tensor, intra: Intra, part: Part, n: int) -> tuple[int, int, Tensor, Tensor]:
        """Where lines begin and end, and int64 ``[B, H]`` stride and phase, from the first token that may hold a line.

        `columns` ``[B, H, keys]``: the share of the last queries' attention on each key, not read where both are given.
        """
        start = min(max(part.start, intra.sink), n)
        stop = max(start, min(part.stop, n))
        strides = self.scene.strides(intra.stride)
        if len(strides) == 1 and intra.phase is not None:
            stride = torch.full(columns.shape[:2], strides[0], device=columns.device)
            phase = torch.full(columns.shape[:2], intra.phase, device=columns.device)
        else:
            able = columns[..., part.start : min(part.stop, part.asked)]
            stride, phase, _ = lines_of(able, strides, phase=intra.phase)
        return start, stop, stride, (part.start + phase - start) % stride

    def _recall(self, weights: Tensor, visible: Callable[[Tensor], Tensor]) -> None:
        """Keep the share of the last few queries' attention on the keys that `visible` gives for their rows."""
        if not self.probe:
            return
        length = weights.shape[2]
        rows = torch.arange(weights.shape[3] - length, weights.shape[3], device=weights.device)[-PROBED:]
        kept = visible(rows)
        self.layer.recalls.append((weights[:, :, -PROBED:] * kept).sum(-1).mean(-1).flatten())


def _joined(parts: Sequence[tuple[slice | list[int], Found]], heads: int) -> Found:
    """What groups of the heads of one prompt found; of one group it is that itself, since a copy takes time."""
    if len(parts) == 1:
        return parts[0][1]
    whole = Found(*(x.new_empty(1, heads, *x.shape[2:]) for x in parts[0][1]))
    for which, found in parts:
        for into, each in zip(whole, found, strict=True):
            into[:, which] = each
    return whole


def _window(length: int, local: int, sink: int, tail: int, heads: torch.Size, rows: Tensor) -> Tensor:
    return a_shape_visible(rows, length, sink=sink, local=local, tail=tail).expand(*heads, -1, -1)


def _lines(grid: Grid, phase: Tensor, length: int, rows: Tensor) -> Tensor:
    return grid_visible(grid, phase, rows, length)


def block_of(shrink: float) -> int:
    """Rows of a block: 64 as published, a smaller power of two where a prompt is shorter, and at least 8.

    Rounded down: slashes that lie apart fill whole blocks, which costs more than small calls do.
    """
    return max(8, 2 ** floor(log2(64 * shrink)))
