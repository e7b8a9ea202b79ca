"""What every head of a prompt sees, as numbers and index tables that the kernel reads. Made on the device, without asking it.

A head sees the union of parts that share no pair: a sink, a window, vertical lines behind the window, or the block diagonals
and the single columns of an index. Rows from `whole` on and rows of horizontal lines see every key before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from vlmbench.kernels.vertical_slash.index import Index

FIELDS = ("sink", "local", "whole", "start", "stop", "stride", "phase", "lines", "index", *("unused",) * 3)
"""Of every head, int32, as many as the kernel counts on: `lines` is 1 for horizontal, 2 for vertical, 4 for slash."""
ROWS = 64
"""Rows and keys of a block of the kernel's index; an index of smaller blocks is masked inside of them."""


@dataclass(frozen=True)
class Pattern:
    """What some heads see, in tokens; what is None is not there."""

    sink: int = 0
    local: int = 0
    """The window with the query itself; 0 for none."""
    whole: int | None = None
    """Rows from here on see every key before them."""
    start: int = 0
    stop: int = 0
    """Lines lie in ``[start, stop)``, behind the sink, and end where `whole` rows begin."""
    strides: tuple[int, ...] = (1,)
    """Every distance that `stride` may hold: how many programs there must be is known before the device says which."""
    stride: Tensor | None = None
    """int64 ``[B, h]``; None for the only one of `strides`."""
    phase: Tensor | None = None
    """int64 ``[B, h]``, from `start` on."""
    horizontal: bool = False
    vertical: bool = False
    slash: bool = False
    index: Index | None = None
    """Of these heads. Its main block diagonal is kept whatever it says, unless `single`."""
    single: bool = False
    """Only the columns of `index` count."""


class Blocks(NamedTuple):
    """The index of those heads that have one, row by row."""

    diagonals: Tensor
    """int32 ``[n, R]``: block diagonals of `ROWS`, ascending from the main one; what is not kept stands behind them."""
    n_diagonals: Tensor
    """int32 ``[n, tiles]``: how many of them a tile of rows has."""
    bits: Tensor
    """uint8 ``[n, R']``: which block diagonals of the index itself are kept."""
    columns: Tensor
    """int32 ``[n, nv]``, ascending; -1 for one that is named twice."""
    n_columns: Tensor
    """int32 ``[n, tiles]``: how many of them come before a tile's last row ends."""


class Table(NamedTuple):
    heads: Tensor
    """int32 ``[B, H, 12]``: `FIELDS`."""
    blocks: Blocks | None
    block: int
    """Of the index; `ROWS` without one."""
    shift: int
    """Position of the first row among the keys."""
    rows: int
    lines: int
    """Horizontal lines of the head that may have most of them."""
    slashes: tuple[tuple[int, int], ...]
    """(rows that hold slashes, stride) of every distance that a head may have."""
    kinds: int
    """For tuning: 4 if some head has lines, 8 if some has neither lines nor an index, and always 2. (Triton compiles anew for
    a number that is 1 or that 16 divides.)"""

    @classmethod
    def of(
        cls, patterns: Sequence[tuple[Tensor, Pattern]], batch: int, rows: int, device: torch.device, *, shift: int = 0
    ) -> Table:
        """`patterns` are (int64 ``[h]`` numbers of heads, what they see), each of the H heads once.

        Raises `ValueError` for what no kernel could be right for: lines in front of the sink or that end before rows see
        everything, horizontal ones with `shift`, a stride below 1, an index beside other parts, of another length or of
        blocks that do not divide `ROWS`, indices whose blocks differ.
        """
        end, count = shift + rows, sum(len(numbers) for numbers, _ in patterns)
        heads = torch.zeros(batch, count, len(FIELDS), dtype=torch.int32, device=device)
        held: list[tuple[Pattern, Index]] = []
        first = lines = 0
        slashes: set[tuple[int, int]] = set()
        kinds = 2
        for numbers, each in patterns:
            _check(each, shift, end)
            whole = min(max(each.whole if each.whole is not None else end, shift), end)
            stop = min(each.stop, end, whole)
            flags = each.horizontal + 2 * each.vertical + 4 * each.slash if stop > each.start else 0
            # Whatever is beyond the prompt is as good as its length, and the kernel adds and multiplies in 32 bits.
            strides = [min(stride, end) for stride in each.strides]
            start = min(each.start, end)
            sizes = (min(each.sink, end), min(each.local, end), whole, start, stop, strides[0], 0, flags, -1)
            # Not blocking: a copy that blocks waits for all that the device has to do.
            numbers = numbers.to(device, non_blocking=True)
            heads[:, numbers, : len(sizes)] = torch.tensor(sizes, dtype=torch.int32).to(device, non_blocking=True)
            for place, value in ((5, each.stride), (6, each.phase)):
                if value is not None:
                    heads[:, numbers, place] = value.clamp(max=end).to(device, torch.int32)
            kinds |= 4 if flags else 8 if each.index is None else 0
            if each.horizontal and flags:
                lines = max(lines, -(-(stop - start) // min(strides)))
            if each.slash and flags:
                slashes |= {(stop - start, stride) for stride in strides}
            if each.index is not None:
                numbered = torch.arange(batch * len(numbers), dtype=torch.int32, device=device) + first
                heads[:, numbers, 8] = numbered.view(batch, -1)
                first += batch * len(numbers)
                held.append((each, each.index))
        if not held:
            return cls(heads, None, ROWS, shift, rows, lines, tuple(sorted(slashes)), kinds)
        sizes_of = {index.block for _, index in held}
        if len(sizes_of) > 1:
            raise ValueError(f"indices of one launch must have blocks of one size, not {sorted(sizes_of)}")
        blocks = _blocks(held, shift, rows)
        return cls(heads, blocks, sizes_of.pop(), shift, rows, lines, tuple(sorted(slashes)), kinds)


def _check(pattern: Pattern, shift: int, end: int) -> None:
    if min(pattern.strides) < 1:
        raise ValueError(f"a stride must be at least 1, not {min(pattern.strides)}")
    lines = pattern.horizontal or pattern.vertical or pattern.slash
    if lines and pattern.start < pattern.sink:
        raise ValueError(f"lines from {pattern.start} on need a sink before them, not one of {pattern.sink}")
    if pattern.horizontal and shift:
        raise ValueError(f"horizontal lines need all rows from 0 on, not from {shift}")
    if lines and pattern.local < 1:
        raise ValueError("lines need a window of at least 1; a query sees itself")
    whole = end if pattern.whole is None else min(max(pattern.whole, shift), end)
    if lines and pattern.stop < whole:
        raise ValueError(f"lines that end at {pattern.stop} need rows that see everything from there on, not {whole}")
    if pattern.index is None:
        return
    if lines or pattern.sink or pattern.local or pattern.whole is not None:
        raise ValueError("a head with an index has no sink, window or lines besides: its pairs would count twice")
    if ROWS % pattern.index.block:
        raise ValueError(f"the blocks of an index must divide {ROWS}, not be {pattern.index.block}")
    if pattern.index.diagonals.shape[2] < -(-end // pattern.index.block):
        raise ValueError(f"the index has {pattern.index.diagonals.shape[2]} block diagonals, too few for {end} tokens")
    if pattern.index.length != end or (shift and not pattern.single):
        raise ValueError(f"the index is for {pattern.index.length} tokens; here are rows {shift} to {end}")


def _blocks(held: Sequence[tuple[Pattern, Index]], shift: int, rows: int) -> Blocks:
    most = max(index.columns.shape[2] for _, index in held)
    columns = torch.cat(
        [
            functional.pad(index.columns.flatten(0, 1), (0, most - index.columns.shape[2]), value=2**31 - 1)
            for _, index in held
        ]
    )
    kept = torch.cat([_kept(pattern, index).flatten(0, 1) for pattern, index in held])  # [n, R']
    fine = ROWS // held[0][1].block
    coarse = functional.pad(kept, (fine - 1, -kept.shape[1] % fine + fine - 1)).unfold(1, 2 * fine - 1, fine).any(-1)
    tiles = torch.arange(-(-rows // ROWS) + 1, device=kept.device)
    ends = (shift + (tiles + 1) * ROWS).clamp(max=shift + rows)
    again = functional.pad(columns[:, 1:] == columns[:, :-1], (1, 0))
    return Blocks(
        (~coarse).to(torch.uint8).argsort(dim=1, stable=True).int(),
        coarse.int().cumsum(1)[:, tiles.clamp(max=coarse.shape[1] - 1)].int(),
        kept.to(torch.uint8).contiguous(),
        columns.masked_fill(again, -1).clamp(-1, 2**31 - 1).int().contiguous(),
        torch.searchsorted(columns, ends.expand(len(columns), -1).contiguous()).int(),
    )


def _kept(pattern: Pattern, index: Index) -> Tensor:
    if pattern.single:
        return torch.zeros_like(index.diagonals)
    main = torch.arange(index.diagonals.shape[2], device=index.diagonals.device) == 0
    return index.diagonals | main
