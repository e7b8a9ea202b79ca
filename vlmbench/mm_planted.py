"""Made-up queries and keys with structure in them, and the rule that patterns draw from them: for `bench attention`.

Random tensors have no lines, columns or diagonals: an index of them would be scattered as no model's is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmbench.errors import UsageError
from vlmbench.mm_attention import Layer, attention
from vlmbench.mm_patterns import Head, Scene

LOGIT = 6.0
"""Of a planted pair, over noise of one."""
HARMONICS = 8
"""Of the wave that makes diagonals: two dimensions each."""
CLUSTER = 64
"""Columns that lie together."""


def plant(heads: Sequence[Head], scene: Scene, q: Tensor, k: Tensor) -> None:
    """Change ``q [1, H, N, D]`` and ``k [1, Hkv, N, D]`` in place, heads of one key head each in dimensions of their own kind.

    Grid heads see one place in every frame, vertical-slash heads clusters of columns and diagonals eight frames apart.
    """
    n, dim = q.shape[2:]
    if dim < 2 * HARMONICS + 2:
        raise UsageError(f"--head-dim must be at least {2 * HARMONICS + 2} for planted patterns, not {dim}.")
    place = torch.arange(n, device=q.device)
    line, column, wave = 0, 1, slice(2, 2 + 2 * HARMONICS)
    high = math.sqrt(LOGIT * math.sqrt(dim))
    turns = 2 * math.pi / (8 * scene.frame) * place[:, None] * torch.arange(1, HARMONICS + 1, device=q.device)
    waves = torch.cat([turns.cos(), turns.sin()], 1).to(q.dtype) * high / math.sqrt(HARMONICS)  # [N, 2 · HARMONICS]
    start, stop = scene.vision
    lines = (place >= start) & (place < stop) & ((place - start) % scene.frame == scene.frame // 3)
    columns = (place // CLUSTER) % 16 == 3  # one in sixteen
    q[..., : wave.stop] = 0  # of no use to any other head
    k[..., line], k[..., column], k[..., wave] = lines * high, columns * high, waves
    for number, head in enumerate(heads):
        if head.vision.kind == "grid":
            q[:, number, :, line] = high
        elif head.vision.kind == "vs":
            q[:, number, :, column] = high / 2
            q[:, number, :, wave] = waves


@dataclass(frozen=True)
class Seen:
    """The rule that heads follow on given queries and keys."""

    layer: Layer
    heads: int

    @classmethod
    def of(cls, heads: Sequence[Head], scene: Scene, q: Tensor, k: Tensor) -> Seen:
        """Raises `UsageError` for Q- and 2D-boundary, whose rule is of several parts."""
        if any(head.inter not in ("none", "k") for head in heads):
            raise UsageError("mminference is timed without boundaries here; leave boundary out.")
        return cls(attention(q, k, k, heads, scene, probe=False)[1], q.shape[1])

    @property
    def pairs(self) -> float:
        """Allowed pairs of a head, on average."""
        return self.layer.allowed / self.heads

    def visible(self, rows: Tensor) -> Tensor:
        """Boolean ``[H, r, N]``."""
        found: dict[int, Tensor] = {}
        for numbers, rule in self.layer.rules:
            found |= dict(zip(numbers.tolist(), rule(rows.to(numbers.device))[0], strict=True))
        return torch.stack([found[number] for number in range(self.heads)])
