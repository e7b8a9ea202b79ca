"""LLaVA-OneVision: SigLIP tower, bilinear pooling per frame, Qwen2 language model with 1-D positions.

A video of T frames gives T × n tokens and one learned newline at its end, which is a separator and no frame's token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from vlmbench.layout import Span, TokenLayout
from vlmbench.models.base import Features, Inputs, runs_of, text_between
from vlmbench.models.llava_base import LlavaFamily


class LlavaOnevision(LlavaFamily):
    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    @property
    def eager_attention(self) -> Callable[..., Any]:
        return eager_attention_forward

    def encode_vision(self, inputs: Inputs) -> Features:
        image = video = None
        if "pixel_values" in inputs:
            packed = self.model.model.get_image_features(
                inputs["pixel_values"],
                inputs["image_sizes"],
                batch_num_images=inputs.get("batch_num_images"),
                return_dict=True,
            ).pooler_output
            image = torch.cat(list(packed), dim=0)
        if "pixel_values_videos" in inputs:
            # One call a video: videos of one prompt may differ in length.
            video = torch.cat([self._encode_video(frames) for frames in inputs["pixel_values_videos"]])
        return Features(image, video)

    def _encode_video(self, frames: Tensor) -> Tensor:
        """``[T, 3, H, W]`` to ``[T · n + 1, C]``; transformers below 5.23 adds the newline only in its own forward."""
        found = self.model.model.get_video_features(frames[None], return_dict=True).pooler_output[0]
        if found.shape[0] == len(frames) * self._tokens_per_frame:
            found = torch.cat([found, self.model.model.image_newline[None].to(found)])
        return found

    def _layout(self, images: Tensor, videos: Tensor, inputs: Inputs) -> TokenLayout:
        per_frame = self._tokens_per_frame
        frames = [len(video) for video in inputs.get("pixel_values_videos", ())]
        pictures = len(inputs["image_sizes"]) if "image_sizes" in inputs else 0
        spans: list[Span] = []
        media = 0
        for start, stop in runs_of(images | videos):
            cursor = start
            while cursor < stop:  # media may stand side by side without text between them
                if bool(videos[cursor]):
                    for frame in range(frames.pop(0)):
                        spans.append(Span("video", cursor, cursor + per_frame, media, frame, self._grid))
                        cursor += per_frame
                    spans.append(Span("separator", cursor, cursor + 1, media))
                    cursor += 1
                else:
                    tokens = int(images.sum()) // pictures
                    spans.append(Span("image", cursor, cursor + tokens, media, 0))
                    cursor += tokens
                media += 1
        return TokenLayout(text_between(spans, images.shape[0]))

    @property
    def _grid(self) -> tuple[int, int]:
        side = -(-self._patches // 2)
        return side, side
