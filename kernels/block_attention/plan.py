"""Which tokens form the sink, the blocks and the tail of a prompt."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

Remainder = Literal["tail", "head", "last"]


@dataclass(frozen=True)
class Plan:
    """Regions that partition ``[0, length)``: the sink ``[0, sink)``, adjoining blocks, and the tail up to `length`."""

    sink: int
    """Sink tokens: the text before the first frame, and the sink's frames."""
    blocks: tuple[tuple[int, int], ...]
    """``[start, stop)`` of every block, in order, the first starting at `sink`."""
    length: int

    @property
    def tail(self) -> int:
        """First token of the tail, which is never empty."""
        return self.blocks[-1][1] if self.blocks else self.sink

    def visible(self, rows: Tensor) -> Tensor:
        """Which keys the queries at `rows` ``[r]`` may see: boolean ``[r, N]``.

        ``j <= i`` and (i in the tail, or j in the sink, or both in the same block).
        """
        region = torch.full((self.length,), -1)  # the tail
        region[: self.sink] = 0
        for number, (start, stop) in enumerate(self.blocks, 1):
            region[start:stop] = number
        of_query, keys = region[rows][:, None], torch.arange(self.length)
        return (keys <= rows[:, None]) & ((of_query == -1) | (region == 0) | (of_query == region))

    @cached_property
    def allow(self) -> Tensor:
        """`visible` of every query: ``[N, N]``."""
        return self.visible(torch.arange(self.length))

    @property
    def pairs(self) -> int:
        """Query-key pairs that the rule allows."""
        sizes = [stop - start for start, stop in self.blocks]
        tail = self.length - self.tail
        return (
            _causal(self.sink)
            + sum(_causal(size) + size * self.sink for size in sizes)
            + _causal(tail)
            + tail * self.tail
        )

    def selected(self, layout: object, keep: Sequence[int]) -> Plan:
        """The same regions over the tokens at the sorted indices `keep` alone; blocks of which none is left are gone."""
        edges = [(bisect_left(keep, start), bisect_left(keep, stop)) for start, stop in self.blocks]
        return Plan(bisect_left(keep, self.sink), tuple(edge for edge in edges if edge[0] < edge[1]), len(keep))


def make_plan(
    units: Sequence[tuple[int, int]], length: int, *, sink: int, block: int, remainder: Remainder = "tail"
) -> Plan | None:
    """Group temporal units ``[start, stop)`` into a sink of `sink` units and blocks of `block` units.

    Units left over go to the tail, or form a smaller block: the first one (``head``) or the last one (``last``). A block of
    more units than there are is cut to what there is. None when no unit is left for a block.
    """
    sink = min(sink, len(units))
    rest = units[sink:]
    if not rest:
        return None
    block = min(block, len(rest))
    left = len(rest) % block
    sizes = [block] * (len(rest) // block)
    if left and remainder == "head":
        sizes.insert(0, left)
    elif left and remainder == "last":
        sizes.append(left)
    edges = [0, *accumulate(sizes)]
    return Plan(rest[0][0], tuple((rest[a][0], rest[b - 1][1]) for a, b in pairwise(edges)), length)


def _causal(n: int) -> int:
    return n * (n + 1) // 2
