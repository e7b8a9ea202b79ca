"""Which token of a prompt is what: spans, units and the prompt itself, and the one place where tokens are dropped."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["text", "video", "image", "separator"]
VISUAL: frozenset[str] = frozenset({"video", "image"})
"""Kinds that hold picture content; a separator (LLaVA's learned newline) only marks where a medium ends."""


@dataclass(frozen=True)
class Span:
    """Tokens ``[start, stop)`` of one kind."""

    kind: Kind
    start: int
    stop: int
    media: int | None = None
    """Which video or picture, in prompt order."""
    frame: int | None = None
    """Temporal unit inside its medium (Qwen-VL: one unit is two sampled frames)."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the frame's tokens, when all of them are there."""

    def __len__(self) -> int:
        return self.stop - self.start


class Unit(NamedTuple):
    """One temporal unit with whatever text belongs to it: ``[start, stop)``."""

    start: int
    stop: int


@dataclass(frozen=True)
class TokenLayout:
    """Spans in order that cover ``[0, length)`` without gaps."""

    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return self.spans[-1].stop if self.spans else 0

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """A unit starts at its frame's first token and ends before the next frame's first token.

        Several videos form one list of units. Text and separators after the last visual token are the tail and belong
        to no unit, so the last unit ends with its own last visual token.
        """
        frames = [span for span in self.spans if span.kind in VISUAL]
        starts = [span.start for span in frames]
        return tuple(
            Unit(span.start, stop)
            for span, stop in zip(frames, [*starts[1:], *(f.stop for f in frames[-1:])], strict=True)
        )

    def count(self, *kinds: str) -> int:
        return sum(len(span) for span in self.spans if span.kind in kinds)

    @property
    def n_visual(self) -> int:
        return self.count(*VISUAL)

    def indices(self, *kinds: str) -> Tensor:
        """Sorted token indices of these kinds, int64 ``[n]`` on the CPU."""
        parts = [torch.arange(span.start, span.stop) for span in self.spans if span.kind in kinds]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

    def select(self, keep: list[int]) -> TokenLayout:
        """The layout after only the sorted indices `keep` are left. A frame that lost tokens loses its grid."""
        spans: list[Span] = []
        for span in self.spans:
            n = bisect_left(keep, span.stop) - bisect_left(keep, span.start)
            if n:
                start = spans[-1].stop if spans else 0
                grid = span.grid if n == len(span) else None
                spans.append(replace(span, start=start, stop=start + n, grid=grid))
        return TokenLayout(tuple(spans))

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)


@dataclass(frozen=True)
class Prompt:
    """Everything prefill needs, after vision and before layer 0. Batch is one."""

    embeds: Tensor
    """``[1, N, C]``: text embeddings with visual features spliced in."""
    positions: Tensor
    """``[1, N]``, or ``[3, 1, N]`` for M-RoPE."""
    layout: TokenLayout
    next_position: int
    """Position of the first generated token, on every axis. Dropping tokens never changes it."""
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    def select(self, keep: Tensor) -> Prompt:
        """Keep only the tokens at `keep` (int64 ``[n]``, sorted, without repeats), positions unchanged.

        Raises `ValueError` when the last token is not kept: its logits are the answer's first token.
        """
        order = keep.tolist()
        if not order or order[-1] != self.length - 1:
            raise ValueError(f"the last prompt token {self.length - 1} must be kept; keep ends with {order[-1:]}")
        if any(a >= b for a, b in pairwise(order)):
            raise ValueError("keep must be sorted and without repeats")
        device, layout = keep.to(self.embeds.device), self.layout.select(order)
        return replace(
            self,
            embeds=self.embeds[:, device],
            positions=self.positions[..., device],
            layout=layout,
            extras=select_extras(self.extras, layout, order),
        )


def select_extras(extras: Mapping[str, Any], layout: TokenLayout, keep: list[int]) -> dict[str, Any]:
    """A prompt's extras when only its tokens at the sorted indices `keep` are left, which `layout` describes.

    What speaks of single tokens has a method ``selected(layout, keep)``; all else stays as it is.
    """
    return {
        name: value.selected(layout, keep) if hasattr(value, "selected") else value for name, value in extras.items()
    }
