"""Between a model and MemVP's memory: the prompt without its pictures, the slots they fill, and the hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmbench.layout import VISUAL, Prompt
from vlmbench.memvp_memory import (
    DROPOUT,
    MOST_SLOTS,
    VISUAL_SLOTS,
    Memory,
    MemoryShape,
    Unit,
    VisualMemory,
    memory_term,
)

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter
    from vlmbench.patch import Patcher


def text_tokens(prompt: Prompt) -> Tensor:
    """int64 ``[T]``: what stays when every picture goes, and with it what marks it.

    Families with M-RoPE put a medium between a start and an end token of its own, which mean nothing without it.
    """
    keep = dict.fromkeys(prompt.layout.indices("text").tolist())
    if prompt.positions.dim() == 3:
        for _, spans in groupby(prompt.layout, key=lambda span: (span.kind == "text", span.media)):
            medium = list(spans)
            if medium[0].kind != "text":
                keep.pop(medium[0].start - 1, None)
                keep.pop(medium[-1].stop, None)
    return torch.tensor(list(keep), dtype=torch.long)


def text_alone(prompt: Prompt) -> Prompt:
    """The prompt as if it had never had a picture: its text tokens, at positions 0, 1, 2, … on every axis."""
    if not prompt.layout.n_visual:
        return prompt
    keep = text_tokens(prompt).to(prompt.embeds.device)
    places = torch.arange(len(keep), device=prompt.positions.device)
    return replace(
        prompt,
        embeds=prompt.embeds[:, keep],
        positions=places.expand(*prompt.positions.shape[:-1], -1),
        layout=prompt.layout.select(keep.tolist()),
        next_position=len(keep),
    )


def units_of(prompt: Prompt) -> list[Unit]:
    """The features of every frame and picture, as the language model would have read them."""
    return [(prompt.embeds[0, span.start : span.stop], span.grid) for span in prompt.layout if span.kind in VISUAL]


def shape_for(adapter: ModelAdapter, slots: int, units: Sequence[Unit] = (), vision: int = 0) -> MemoryShape:
    """Sizes for this model, with codes for as many of these units as `MOST_SLOTS` holds."""
    shapes = adapter.shapes
    largest = max((len(features) for features, _ in units), default=1)
    most = max(1, MOST_SLOTS // min(largest, VISUAL_SLOTS, slots))
    return MemoryShape(
        size=shapes.hidden,
        hidden=shapes.hidden,
        slots=slots,
        units=max(1, min(len(units), most)),
        vision_blocks=shapes.vision_layers if vision else 0,
        vision_hidden=shapes.vision_hidden if vision else 0,
        vision_width=vision,
    )


def add_memory(patch: Patcher, memory: VisualMemory, current: Callable[[], Memory | None]) -> None:
    """Let every feed-forward block also read the `current` memory, and the tower's blocks their adapters."""

    def read(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        held = current()
        if held is None:
            return output
        return output + memory_term(args[0], held, dropout=DROPOUT if memory.training else 0.0)

    for layer in patch.adapter.layers:
        patch.post(layer.mlp, read)
    for block, beside in zip(patch.adapter.vision_blocks, memory.vision, strict=False):
        patch.post(block.mlp, _beside(beside))  # type: ignore[arg-type]


def _beside(small: nn.Module) -> Callable[..., Tensor]:
    return lambda module, args, kwargs, output: output + small(args[0])
