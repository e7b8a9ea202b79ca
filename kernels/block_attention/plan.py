"""Which tokens form the sink, the blocks and the tail of a prompt."""

from __future__ import annotations

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

    @cached_property
    def allow(self) -> Tensor:
        """The visibility rule as a boolean ``[N, N]``: query i may see key j.

        ``j <= i`` and (i in the tail, or j in the sink, or both in the same block).
        """
        allow = torch.zeros(self.length, self.length, dtype=torch.bool)
        allow[:, : self.sink] = True
        for start, stop in self.blocks:
            allow[start:stop, start:stop] = True
        allow[self.tail :] = True
        return allow.tril_()

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
