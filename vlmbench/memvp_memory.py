"""MemVP's memory (arXiv 2405.05615): visual features as extra entries of every feed-forward block.

A feed-forward block is read as a key–value memory, Σ_i φ(x·k_i) v_i. A sample's visual features z_i become more of its
entries, K_i = λ f(z_i) + p^k_i and V_i = λ f(z_i) + p^v_i, without a gate also where the block has one, and the same in
every layer: y = FFN(u) + s · Σ_i φ(u·K_i) V_i. There is no softmax, no 1/√d and no order among the slots but by p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BOTTLENECK = 128
"""Width inside the projector f."""
DROPOUT = 0.1
"""Of the slots' activations, in training alone."""
GRID = 16
"""A frame's features fill at most GRID × GRID slots; larger ones are pooled (extension)."""
VISUAL_SLOTS = GRID * GRID
SCALE, WEIGHT, SLOTS = 0.1, 0.01, 320
"""s, λ and E as published for LLaMA-7B (E = 400 for 13B)."""
MOST_SLOTS = 1024
"""A video's visual slots at most: units are averaged until they fit (extension)."""


class Memory(NamedTuple):
    """What all layers of one batch share."""

    keys: Tensor
    """``[B, E, d]``."""
    values: Tensor
    """``[B, E, d]``, the scale s inside."""
    mask: Tensor | None = None
    """bool ``[B, E]``; false where a slot only pads. A padded slot is not neutral by itself: its key still fires."""

    def to(self, dtype: torch.dtype) -> Memory:
        """Once a sample instead of once a layer and step."""
        return self._replace(keys=self.keys.to(dtype), values=self.values.to(dtype))


def memory_term(
    u: Tensor, memory: Memory, activation: Callable[[Tensor], Tensor] = F.silu, dropout: float = 0.0
) -> Tensor:
    """Σ_i φ(u·K_i) V_i: ``[B, T, d]``, of the block's own input `u` ``[B, T, d]``.

    Every position reads every slot and no other position. `dropout` is the share of activations that is dropped.
    """
    keys, values = (each.to(u.dtype) for each in memory[:2])
    weights = activation(u @ keys.mT)  # [B, T, E]
    if memory.mask is not None:
        weights = weights * memory.mask[:, None]
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ values


class Slots(NamedTuple):
    """One sample's slots before projection; the visual ones come first."""

    features: Tensor
    """``[N, c]``, zero where nothing is seen."""
    present: Tensor
    """bool ``[N]``: whether a feature stands here. Slots without one are memory that was learned."""
    row: Tensor
    """int64 ``[N]``: row of p^k and p^v."""
    unit: Tensor
    """int64 ``[N]``: temporal unit (frame, or picture) of the sample."""

    @property
    def n_visual(self) -> int:
        return int(self.present.sum())


Unit = tuple[Tensor, tuple[int, int] | None]
"""Features ``[n, c]`` of a frame or picture, and their grid (rows, columns) where there is one."""


def lay_out(units: Sequence[Unit], slots: int, most_units: int, like: Tensor) -> Slots:
    """Slots of a sample of these units (frames, pictures); `like` is any tensor of their channels, type and device.

    One picture of n features fills slots 0 to n - 1, and the others up to `slots` see nothing, as published. A unit above
    16 × 16 features, or above `slots`, is pooled; more units than `most_units` are averaged in groups of neighbours. Each
    unit uses the rows of p from 0 on, and what tells it from the others is its own code (extension).
    """
    most = min(VISUAL_SLOTS, slots)
    pooled = _fewer_units([pool(features, grid, most) for features, grid in units], most_units)
    sizes = [len(each) for each in pooled]
    learned = range(max(sizes, default=0), slots)
    rows = [row for n in sizes for row in range(n)]
    code = [min(index, most_units - 1) for index, n in enumerate(sizes) for _ in range(n)]
    blank = like.new_zeros(len(learned), like.shape[-1])
    device = like.device
    present = torch.arange(len(rows) + len(learned), device=device) < len(rows)
    return Slots(
        torch.cat([*pooled, blank]),
        present,
        torch.tensor([*rows, *learned], device=device, dtype=torch.long),
        torch.tensor([*code, *[0] * len(learned)], device=device, dtype=torch.long),
    )


def pool(features: Tensor, grid: tuple[int, int] | None, most: int) -> Tensor:
    """At most `most` of the features ``[n, c]``: averages over a square grid, or over runs when they have no grid."""
    if len(features) <= most:
        return features
    side = int(most**0.5)
    if grid is None or min(grid) < side:
        return F.adaptive_avg_pool1d(features.mT, most).mT
    return F.adaptive_avg_pool2d(features.mT.unflatten(1, grid), side).flatten(1).mT


def _fewer_units(units: list[Tensor], most: int) -> list[Tensor]:
    """Neighbours of one size averaged, each run of them in proportion to its length, until about `most` are left."""
    if len(units) <= most:
        return units
    found: list[Tensor] = []
    start = 0
    for stop in range(1, len(units) + 1):
        if stop == len(units) or len(units[stop]) != len(units[start]):
            run = torch.stack(units[start:stop], -1)  # [n, c, units]
            left = max(1, (stop - start) * most // len(units))
            found += F.adaptive_avg_pool1d(run, left).unbind(-1)
            start = stop
    return found


@dataclass(frozen=True)
class MemoryShape:
    """Sizes that decide what is trained; a file holds them in its header."""

    size: int
    """Of a feature z."""
    hidden: int
    """Of the language model, d."""
    slots: int
    """Rows E of p^k and p^v. Those above the features of a picture are plain learned memory."""
    units: int = 1
    """Frames or pictures that have a code of their own (extension); with one there is no code."""
    vision_blocks: int = 0
    """Blocks of the vision tower with an adapter beside their MLP; 0 leaves the tower as it is."""
    vision_hidden: int = 0
    vision_width: int = 0


class VisualMemory(nn.Module):
    """All that MemVP trains beside the language model: f, p^k and p^v, codes of units, and adapters in the tower."""

    def __init__(self, shape: MemoryShape, *, scale: float, weight: float = WEIGHT) -> None:
        """`scale` is s and `weight` λ. Parameters are uninitialised until `start` or loading."""
        super().__init__()
        self.shape, self.scale, self.weight = shape, scale, weight
        self.projector = nn.Sequential(
            nn.Linear(shape.size, BOTTLENECK), nn.SiLU(), nn.Linear(BOTTLENECK, shape.hidden)
        )
        self.p_k = nn.Parameter(torch.empty(shape.slots, shape.hidden))
        self.p_v = nn.Parameter(torch.empty(shape.slots, shape.hidden))
        coded = shape.units if shape.units > 1 else 0
        self.unit_k = nn.Parameter(torch.empty(coded, shape.hidden))
        self.unit_v = nn.Parameter(torch.empty(coded, shape.hidden))
        self.vision = nn.ModuleList(
            VisionAdapter(shape.vision_hidden, shape.vision_width) for _ in range(shape.vision_blocks)
        )

    def start(self, seed: int) -> Self:
        """The published first weights. p^v is zero and the values are still not: with a picture this is no identity."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.projector[0], self.projector[2]):
                nn.init.xavier_uniform_(layer.weight, generator=generator)  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            for keys in (self.p_k, self.unit_k):
                keys.normal_(0, 0.02, generator=generator)
            for values in (self.p_v, self.unit_v):
                values.zero_()
            for adapter in self.vision:
                nn.init.xavier_uniform_(adapter.down.weight, generator=generator)  # type: ignore[union-attr, arg-type]
                nn.init.zeros_(adapter.up.weight)  # type: ignore[union-attr, arg-type]
        return self

    @property
    def count(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, samples: Sequence[Slots]) -> Memory:
        """The memory of a batch, padded to its largest with a mask. Once a sample: all layers and steps read the same.

        Above 256 visual slots s becomes s · 256 / n (extension): the sum has no normaliser and would grow with them.
        """
        most = max(len(each.row) for each in samples)
        features, present, row, unit = (
            torch.stack([_padded(part, most) for part in parts]) for parts in zip(*samples, strict=True)
        )
        seen = present[..., None].to(self.p_k.dtype)
        projected = seen * self.weight * self.projector(features.to(self.p_k.dtype))
        own_k, own_v = self.p_k[row], self.p_v[row]
        if len(self.unit_k):
            own_k, own_v = own_k + seen * self.unit_k[unit], own_v + seen * self.unit_v[unit]
        keys, values = self.entries(projected, own_k, own_v)
        scale = self.scale * VISUAL_SLOTS / seen.sum(1, keepdim=True).clamp(min=VISUAL_SLOTS)
        mask = None
        if any(len(each.row) < most for each in samples):
            lengths = torch.tensor([len(each.row) for each in samples], device=row.device)
            mask = torch.arange(most, device=row.device) < lengths[:, None]
        return Memory(keys, scale * values, mask)

    def entries(self, seen: Tensor, own_k: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[B, E, d]`` of what is seen in a slot, λ f(z), and of the slot's own vectors."""
        return seen + own_k, seen + own_v


def _padded(part: Tensor, most: int) -> Tensor:
    return F.pad(part, (*(0, 0) * (part.dim() - 1), 0, most - len(part)))


class VisionAdapter(nn.Module):
    """Beside the MLP of one vision block, reading what the MLP reads: scale · W2 GELU(W1 x); the identity at first."""

    def __init__(self, hidden: int, width: int, scale: float = 0.1) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(F.gelu(self.down(x.to(self.down.weight.dtype))), DROPOUT, self.training)
        return (self.scale * self.up(inner)).to(x.dtype)


def flops(slots: int, size: int, hidden: int, tokens: int) -> int:
    """Of the projector on every slot and of both products at so many tokens (of all layers), multiply-add = 2."""
    return 2 * slots * BOTTLENECK * (size + hidden) + 4 * slots * hidden * tokens
