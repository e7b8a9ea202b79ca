"""Made-up prompts of a given size: what `bench` times and `plan` counts when there is neither a video nor a question."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmbench.errors import UsageError
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.spec import nearest
from vlmbench.video import Clip

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.models.base import ModelAdapter
    from vlmbench.trace import Trace

PREFIX = 14
"""Text tokens before the video in every made-up prompt, where there are so many; the others are behind it."""
TEXT = 74
"""Text tokens of a prompt, unless told otherwise (the number of most fixed workloads)."""


@dataclass(frozen=True)
class Shape:
    """One attention layer and the prompt that goes through it."""

    frames: int
    """Temporal units: on Qwen-VL one unit is two sampled frames."""
    frame_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    name: str | None = None
    """The preset that heads and dimensions are of."""
    text_tokens: int = TEXT

    def __post_init__(self) -> None:
        """Raises `UsageError`."""
        for field in ("frames", "frame_tokens", "heads", "kv_heads", "head_dim", "batch", "text_tokens"):
            if getattr(self, field) < 1:
                raise UsageError(f"--{field.replace('_', '-')} must be at least 1, not {getattr(self, field)}.")
        if self.heads % self.kv_heads:
            raise UsageError(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}.")

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens + self.text_tokens

    @property
    def prefix(self) -> int:
        """Text tokens before the video; at least one is left behind it."""
        return min(PREFIX, self.text_tokens - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of a frame's tokens, as near to a square as their number allows."""
        rows = next(side for side in range(math.isqrt(self.frame_tokens), 0, -1) if self.frame_tokens % side == 0)
        return rows, self.frame_tokens // rows

    def layout(self) -> TokenLayout:
        """Text, frames, text."""
        prefix = self.prefix
        stop = prefix + self.frames * self.frame_tokens
        spans = [Span("text", 0, prefix)] if prefix else []
        for frame in range(self.frames):
            start = prefix + frame * self.frame_tokens
            spans.append(Span("video", start, start + self.frame_tokens, 0, frame, self.grid))
        return TokenLayout((*spans, Span("text", stop, self.tokens)))

    def prompt(self, device: torch.device | str = "cpu") -> Prompt:
        """The layout without embeddings, positions in order."""
        return bare(self.layout(), device)


def bare(layout: TokenLayout, device: torch.device | str = "cpu") -> Prompt:
    """A prompt of this layout without embeddings."""
    n = layout.length
    return Prompt(torch.empty(1, n, 0, device=device), torch.arange(n, device=device)[None], layout, n)


def shapes(
    *,
    tokens: str | None,
    frames: int,
    frame_tokens: int,
    preset: str | None,
    heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 1,
    batch: int = 1,
    text_tokens: int = TEXT,
) -> list[Shape]:
    """The shapes that the options name: one, or one for each prompt length in ``N/N``. Raises `UsageError`."""
    if preset is not None:
        from vlmbench.models.catalogue import PRESETS
        from vlmbench.models.presets import head_shape

        if preset not in PRESETS:
            raise UsageError(f"No preset is called {preset!r} (known: {', '.join(PRESETS)}).{nearest(preset, PRESETS)}")
        heads, kv_heads, head_dim = head_shape(preset)
    one = Shape(frames, frame_tokens, heads, kv_heads, head_dim, batch, preset, text_tokens)
    if tokens is None:
        return [one]
    found = []
    for text in tokens.split("/"):
        least = one.text_tokens + one.frame_tokens
        if not text.isdigit() or int(text) < least:
            raise UsageError(f"--tokens must be numbers of at least {least} with / between them, not {tokens!r}.")
        found.append(replace(one, frames=(int(text) - one.text_tokens) // one.frame_tokens))
    return found


def noise(frames: int, height: int, width: int, seed: int = 0) -> Clip:
    """A video of noise, two frames a second."""
    import numpy as np

    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Clip(pixels, tuple(range(frames)), tuple(i / 2 for i in range(frames)), 2.0, "video", Path("noise"))


def after_clip(method: Method, shape: Shape, per_unit: int, trace: Trace) -> Shape:
    """`shape` with the frames that the method's `prepare_clip` leaves; `per_unit` sampled frames make a temporal unit.

    Raises `UsageError` when the method changes the size of frames, which a made-up prompt does not have.
    """
    clip = noise(shape.frames * per_unit, 16, 16)
    less = method.prepare_clip(clip, trace)
    if less.frames.shape[1:] != clip.frames.shape[1:]:
        raise UsageError(
            f"{method.name} as given changes the size of frames, and a made-up prompt has none; give it a setting that "
            f"changes their number."
        )
    return replace(shape, frames=-(-len(less.indices) // per_unit))


def frames_per_unit(adapter: ModelAdapter) -> int:
    """Sampled frames in a temporal unit of this family."""
    return getattr(adapter.vision_config, "temporal_patch_size", 1)


def embedded(adapter: ModelAdapter, shape: Shape, seed: int = 0) -> Prompt:
    """A made-up prompt with random embeddings and the family's own positions, on the model's device."""
    layout = shape.layout()
    generator = torch.Generator(adapter.device).manual_seed(seed)
    size = (1, layout.length, adapter.shapes.hidden)
    embeds = torch.randn(size, device=adapter.device, dtype=adapter.dtype, generator=generator)
    positions = positions_of(adapter, layout)
    return Prompt(embeds, positions.to(adapter.device), layout, int(positions.max()) + 1)


def positions_of(adapter: ModelAdapter, layout: TokenLayout) -> torch.Tensor:
    """The family's own, ``[1, N]`` or ``[3, 1, N]``. Under M-RoPE a temporal unit is one step of time: no rate is known."""
    if adapter.decode_positions(0).dim() != 3:
        return torch.arange(layout.length)[None]
    from vlmbench.models.qwen_vl import mrope_positions

    videos = {span.media for span in layout.spans if span.kind == "video"}
    return mrope_positions(layout, [1.0] * len(videos))[:, None]


def vision_shape(adapter: ModelAdapter, shape: Shape) -> Shape:
    """`shape` with the tower's own number of tokens where it has only one. Raises `UsageError`."""
    if adapter.fixed_resolution:
        return replace(shape, frame_tokens=adapter._tokens_per_frame)  # type: ignore[attr-defined]
    rows, columns = shape.grid
    if columns > 200 * rows:
        raise UsageError(
            f"--frame-tokens {shape.frame_tokens} is {rows} × {columns}, which the processor refuses as too long a frame."
        )
    return shape


def vision_clips(adapter: ModelAdapter, shape: Shape, method: Method, trace: Trace) -> tuple[Any, Any]:
    """Noise whose frames give just the shape's tokens, and what the method's `prepare_clip` leaves of it."""
    if adapter.fixed_resolution:
        height = width = adapter.vision_config.image_size
    else:
        pixels = adapter.vision_config.patch_size * adapter.vision_config.spatial_merge_size
        height, width = (side * pixels for side in shape.grid)
        for part in (adapter.processor.image_processor, adapter.processor.video_processor):
            part.size = {"shortest_edge": 1, "longest_edge": 2**62}  # as they are: no frame is resized
    clip = noise(shape.frames * frames_per_unit(adapter), height, width)
    return clip, method.prepare_clip(clip, trace)
