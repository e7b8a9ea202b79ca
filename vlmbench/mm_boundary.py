"""Modalities kept apart: an index for the queries of each (Q-boundary), or a pattern for each pair of them (2D-boundary).

MMInference, algorithms 2 and 3. Nothing is moved for the first: rows of one modality use the index of its own last queries.
For the second each modality's tokens are taken out in order; a query sees a key of the other one when it stood before it in
the prompt, and what a query gets from both is joined by log-sum-exp. Between two texts and two pictures order is kept, so
inside a modality plain causality is the prompt's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmbench.kernels.calls import LAST, Attended, attend, causal_rows, join_into
from vlmbench.kernels.sparse_lines import Refused, preferred, warn
from vlmbench.kernels.vertical_slash import fused
from vlmbench.mm_attention import Found, Part, block_of
from vlmbench.mm_patterns import Run

if TYPE_CHECKING:
    from vlmbench.mm_attention import Group


def by_query(group: Group, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``: rows of each modality under its own pattern, over all keys before them."""
    scene = group.scene
    vision, text = ([run for run in scene.runs if run.vision == kind] for kind in (True, False))
    found = None
    if vision:
        last, start = vision[-1], vision[0].start
        keys, values = k[:, :, : last.stop], v[:, :, : last.stop]
        part = Part(start, last.stop, last.stop, min(LAST, last.stop - last.start))
        found = group.intra(
            q[:, :, : last.stop], keys, values, group.head.vision, part, _row_blocks(group, vision, last.stop)
        )
        if not text:
            return found
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    seen = torch.empty(q.shape[:3], dtype=torch.long, device=q.device)
    whole = Found(out, lse, seen)
    if found is not None:
        for into, each in zip(whole, found, strict=True):
            into[:, :, : each.shape[2]] = each
    if group.head.text.kind == "dense":
        for run in text:
            rows = slice(run.start, run.stop)
            own = causal_rows(q, k, v, run.start, run.stop, scale=group.scale, tally=group.layer.tally)
            out[:, :, rows], lse[:, :, rows] = own
            seen[:, :, rows] = torch.arange(run.start, run.stop, device=q.device) + 1
        return whole
    last = text[-1]
    keys, values = k[:, :, : last.stop], v[:, :, : last.stop]
    part = Part(last.stop, last.stop, last.stop, min(LAST, last.stop - last.start))
    theirs = group.intra(q[:, :, : last.stop], keys, values, group.head.text, part, _row_blocks(group, text, last.stop))
    if not vision:
        return theirs
    for run in text:
        for into, each in zip(whole, theirs, strict=True):
            into[:, :, run.start : run.stop] = each[:, :, run.start : run.stop]
    return whole


def _row_blocks(group: Group, runs: list[Run], length: int) -> Tensor | None:
    """Row blocks that hold a token of these runs; None for all of them."""
    size = block_of(group.scene.shrink)
    held = torch.zeros(-(-length // size), dtype=torch.bool)
    for run in runs:
        held[run.start // size : -(-run.stop // size)] = True
    return None if bool(held.all()) else held.nonzero()[:, 0]


def by_pair(group: Group, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """As `by_query`: vision to vision by its pattern, text to text by its own, and what lies between.

    A text query sees all pictures before it, or with a vertical-slash text pattern the columns that the last text attends to
    most; a visual query sees all text before it (as the research code suggests for these pairs).
    """
    head, scale, tally = group.head, group.scale, group.layer.tally
    sides = [_Side(group, kind, q, k, v) for kind in (True, False)]
    vision, text = sides
    for side, intra in ((vision, head.vision), (text, head.text)):
        if side.runs:
            n = side.q.shape[2]
            part = Part(0 if side is vision else n, n, n, min(LAST, side.runs[-1].stop - side.runs[-1].start))
            side.found = group.intra(side.q, side.k, side.v, intra, part)
    if not text.runs or not vision.runs:
        return (vision if vision.runs else text).found
    columns = _columns(group, text, vision) if head.text.kind == "vs" else None
    if columns is not None:
        at, behind = columns
        found = _launched(group, text, k, v, at, behind) if preferred(q.device) else None
        if found is None:
            chosen = (_each(x, at) for x in (k, v))
            found = attend(text.q, *chosen, scale=scale, tally=tally, mask=behind)
        text.join(slice(None), found, behind.sum(-1))
    for side, other in ((vision, text), (text, vision)):
        if side is text and columns is not None:
            continue
        for run, rows in side.rows():
            before = int((other.tokens < run.start).sum())
            if before:
                earlier = (x[:, :, :before] for x in (other.k, other.v))
                side.join(rows, attend(side.q[:, :, rows], *earlier, scale=scale, tally=tally), before)
    whole = Found(
        torch.empty_like(q),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        torch.empty_like(q[..., 0], dtype=torch.long),
    )
    for side in sides:
        for into, each in zip(whole, side.found, strict=True):
            into[:, :, side.tokens] = each
    return whole


class _Side:
    """The tokens of one modality in their order, and what their queries have seen so far."""

    found: Found

    def __init__(self, group: Group, vision: bool, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.runs = [run for run in group.scene.runs if run.vision == vision]
        parts = [torch.arange(run.start, run.stop, device=q.device) for run in self.runs]
        self.tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=q.device)
        if len(self.runs) == 1:
            only = slice(self.runs[0].start, self.runs[0].stop)
            self.q, self.k, self.v = (x[:, :, only] for x in (q, k, v))
        else:
            self.q, self.k, self.v = (x[:, :, self.tokens] for x in (q, k, v))

    def rows(self) -> list[tuple[Run, slice]]:
        """Every run with its place among the modality's own tokens."""
        found, cursor = [], 0
        for run in self.runs:
            found.append((run, slice(cursor, cursor + run.stop - run.start)))
            cursor += run.stop - run.start
        return found

    def join(self, rows: slice, more: Attended, keys: Tensor | int) -> None:
        """Add what the `rows` got from the other modality, of so many `keys` each."""
        out, lse = self.found.out[:, :, rows], self.found.lse[:, :, rows]
        lse.copy_(join_into(out, (out, lse), more))
        seen = self.found.seen.clone()  # it may be one row for all heads
        seen[:, :, rows] += keys
        self.found = self.found._replace(seen=seen)


def _columns(group: Group, text: _Side, vision: _Side) -> tuple[Tensor, Tensor] | None:
    """The tokens of the pictures that the last text attends to most, int64 ``[B, H, c]``, and which text is behind each."""
    last = text.runs[-1]
    before = int((vision.tokens < last.start).sum())
    asked = min(LAST, last.stop - last.start)
    if before == 0:
        return None
    batch, heads = text.q.shape[:2]
    last_q = text.q[:, :, -asked:].reshape(batch, vision.k.shape[1], -1, text.q.shape[3]).float()
    weights = (last_q @ vision.k[:, :, :before].transpose(-1, -2).float()) * group.scale
    group.layer.tally.scores += weights.numel()
    mass = weights.softmax(-1).view(batch, heads, asked, before).sum(-2)
    chosen = mass.topk(min(group.head.text.columns, before)).indices.sort().values
    at = vision.tokens[chosen]
    return at, at[:, :, None] < text.tokens[:, None]  # [B, H, n, c]


def _each(x: Tensor, at: Tensor) -> Tensor:
    """``x [B, Hkv, N, D]`` at each head's ``at [B, H, c]``: ``[B, H, c, D]``."""
    where = at.reshape(*x.shape[:2], -1, 1).expand(-1, -1, -1, x.shape[3])
    return x.gather(2, where).view(*at.shape, x.shape[3])


def _launched(group: Group, text: _Side, k: Tensor, v: Tensor, at: Tensor, behind: Tensor) -> Attended | None:
    """The text over the columns `at` of the prompt's ``k, v [B, H, N, D]``, a launch for each of its runs."""
    parts = []
    try:
        for run, rows in text.rows():
            parts.append(fused.behind_columns(text.q[:, :, rows], k, v, at, run.start, scale=group.scale))
    except Refused as refused:
        warn(refused)
        return None
    group.layer.tally.launched(int(behind.sum()))
    return Attended(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))
