"""LLaVA-1.5: CLIP tower, one token a patch, Llama language model with 1-D positions.

It was trained on single pictures and has no notion of a video. A video is shown as what its authors' users show it as: one
``<image>`` a frame, in order, so that 576 tokens (and the template's line break) go to every frame. That the spans are a
video's is known to the layout alone; the model cannot tell them from pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward

from vlmbench.errors import UsageError
from vlmbench.layout import Span, TokenLayout
from vlmbench.models.base import Features, Inputs, text_between
from vlmbench.models.llava_base import LlavaFamily

if TYPE_CHECKING:
    from vlmbench.suite import Caption
    from vlmbench.video import Clip

TOWERS = (("clip_vision_model", "default"), ("siglip_vision_model", "full"))
"""(type of tower, which of its tokens are read) of the checkpoints that are a LLaVA of this form."""


class Llava15(LlavaFamily):
    name: ClassVar[str] = "llava_15"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        super().__init__(model, processor)
        tower, taken = self.vision_config.model_type, self.config.vision_feature_select_strategy
        if (tower, taken) not in TOWERS:
            known = " or ".join(f"{each} with {strategy}" for each, strategy in TOWERS)
            raise UsageError(
                f"vision_feature_select_strategy={taken} with a tower of type {tower!r} does not give one token a patch "
                f"without a class token; supported: {known}."
            )

    @property
    def eager_attention(self) -> Callable[..., Any]:
        return eager_attention_forward

    def inputs(self, clips: Sequence[Clip], question: str, captions: Sequence[Caption] = ()) -> Inputs:
        """The processor's tensors; of videos under a name of their own, and ``media``: (kind, frames) in prompt order."""
        text, clips = self._written(clips, question, captions)
        if not clips:
            return self.process(text, {})
        frames = [torch.from_numpy(frame).permute(2, 0, 1) for clip in clips for frame in clip.frames]
        found = self.process(text, {"images": frames})
        parts = found.pop("pixel_values").split([len(clip.frames) for clip in clips])
        images = [part for part, clip in zip(parts, clips, strict=True) if clip.kind == "image"]
        videos = [part for part, clip in zip(parts, clips, strict=True) if clip.kind == "video"]
        if images:
            found["pixel_values"] = torch.cat(images)
        if videos:
            found["pixel_values_videos"] = torch.stack(videos) if len({len(each) for each in videos}) == 1 else videos
        return {**found, "media": [(clip.kind, len(clip.frames)) for clip in clips]}

    def content_of(self, clip: Clip) -> list[dict[str, str]]:
        return [{"type": "image"}] * len(clip.frames)

    def encode_vision(self, inputs: Inputs) -> Features:
        image = video = None
        if "pixel_values" in inputs:
            image = self.encode_image(inputs["pixel_values"])
        if "pixel_values_videos" in inputs:
            video = torch.cat([self.encode_video(frames) for frames in inputs["pixel_values_videos"]])
        return Features(image, video)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """``[P, 3, H, W]`` to ``[P · n, C]``."""
        return torch.cat(list(self.model.model.get_image_features(pixels, return_dict=True).pooler_output))

    def encode_video(self, frames: Tensor) -> Tensor:
        """The same of one video's frames, as a call of its own: the model has none by which a method could tell them."""
        return torch.cat(list(self.model.model.get_image_features(frames, return_dict=True).pooler_output))

    def _placeholders(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        pictures = inputs["input_ids"] == self.config.image_token_id
        n = self._tokens_per_frame
        is_video = [kind == "video" for kind, frames in inputs.get("media", ()) for _ in range(frames * n)]
        videos = torch.zeros_like(pictures)
        videos[pictures] = torch.tensor(is_video, dtype=torch.bool, device=pictures.device)
        return pictures & ~videos, videos

    def _layout(self, images: Tensor, videos: Tensor, inputs: Inputs) -> TokenLayout:
        n = self._tokens_per_frame
        starts = iter((images | videos).nonzero().flatten()[::n].tolist())
        spans = [
            Span(kind, start, start + n, media, frame, self._grid)
            for media, (kind, frames) in enumerate(inputs.get("media", ()))
            for frame, start in zip(range(frames), starts, strict=False)
        ]
        return TokenLayout(text_between(spans, images.shape[0]))

    @property
    def _grid(self) -> tuple[int, int]:
        return self._patches, self._patches
