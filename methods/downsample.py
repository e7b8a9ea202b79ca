"""Fewer frames, or smaller ones, before anything is computed: the rival that many published methods fail to beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmbench.budget import check_budget
from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.models.base import ModelAdapter
    from vlmbench.trace import Trace
    from vlmbench.video import Clip


@dataclass(frozen=True)
class Downsample(Method):
    """Keep `ratio` of the frames (evenly spaced), or shrink each frame to `ratio` of its pixels.

    The frames are decoded first and dropped then, so `video_s` is that of the whole clip. The frame rate that M-RoPE
    reads follows the kept frames' own times.
    """

    name: ClassVar[str] = "downsample"
    cite: ClassVar[Citation] = Citation("input downsampling", extension="the whole method")
    traits: ClassVar[Traits] = Traits(stages=frozenset({"frames", "vision", "prompt"}), prefix_reusable=True)

    ratio: float = 0.25
    axis: Literal["frames", "pixels"] = "frames"

    def __post_init__(self) -> None:
        check_budget(self.name, self.ratio, None)

    @classmethod
    def examples(cls) -> list[Downsample]:
        return [cls(ratio=0.5)]

    @classmethod
    def neutral(cls) -> Downsample:
        return cls(ratio=1.0)

    def check(self, adapter: ModelAdapter) -> None:
        if self.axis == "pixels" and adapter.fixed_resolution:
            raise UsageError(
                f"downsample:axis=pixels saves nothing on {adapter.config.model_type}: every frame is resized to the "
                f"tower's one input size; use axis=frames."
            )

    def prepare_clip(self, clip: Clip, trace: Trace) -> Clip:
        less = _smaller(clip, self.ratio) if self.axis == "pixels" else _fewer(clip, self.ratio)
        if less.frames.shape != clip.frames.shape:
            trace.facts["downsampled"] = True
        return less

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        if not prompt.layout.n_visual:
            trace.inactive("the prompt has no visual tokens")
        elif not trace.facts.get("downsampled"):
            trace.inactive(f"the ratio keeps all {self.axis}")
        return prompt


def _fewer(clip: Clip, ratio: float) -> Clip:
    total = len(clip.indices)
    n = max(1, round(ratio * total))
    kept = [int((i + 0.5) * total / n) for i in range(n)]
    return replace(
        clip,
        frames=clip.frames[kept],
        indices=tuple(clip.indices[i] for i in kept),
        times_s=tuple(clip.times_s[i] for i in kept),
    )


def _smaller(clip: Clip, ratio: float) -> Clip:
    import numpy as np
    from PIL import Image

    height, width = clip.frames.shape[1:3]
    size = max(1, round(width * ratio**0.5)), max(1, round(height * ratio**0.5))
    if size == (width, height):
        return clip
    frames = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in clip.frames]
    return replace(clip, frames=np.stack(frames))
