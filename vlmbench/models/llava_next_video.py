"""LLaVA-NeXT-Video: CLIP tower, frames pooled 2×2, pictures in tiles of any resolution, Llama with 1-D positions.

A video of T frames gives T × n tokens and nothing between or behind them; a picture is its whole view and then the rows of
its tiles, each with a learned newline at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.llava_next_video.modeling_llava_next_video import get_anyres_image_grid_shape, unpad_image

from vlmbench.layout import Span, TokenLayout
from vlmbench.models.base import Features, Inputs, runs_of, text_between
from vlmbench.models.llava_base import LlavaFamily


class LlavaNextVideo(LlavaFamily):
    name: ClassVar[str] = "llava_next_video"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)

    @property
    def eager_attention(self) -> Callable[..., Any]:
        return eager_attention_forward

    def encode_vision(self, inputs: Inputs) -> Features:
        core = self.model.model
        image = video = None
        if "pixel_values" in inputs:
            found = core.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
            image = torch.cat(list(found.pooler_output))
        if "pixel_values_videos" in inputs:
            # One call a video: videos of one prompt may differ in length.
            video = torch.cat([self._encode_video(frames) for frames in inputs["pixel_values_videos"]])
        return Features(image, video)

    def _encode_video(self, frames: Tensor) -> Tensor:
        """``[T, 3, H, W]`` to ``[T · n, C]``; a frame's tokens are a dimension of their own in some versions."""
        found = self.model.model.get_video_features(frames[None], return_dict=True).pooler_output
        return torch.cat([each.flatten(0, -2) for each in found])

    def _layout(self, images: Tensor, videos: Tensor, inputs: Inputs) -> TokenLayout:
        per_frame = self._tokens_per_frame
        frames = [len(video) for video in inputs.get("pixel_values_videos", ())]
        pictures = self._picture_tokens(inputs)
        spans: list[Span] = []
        media = 0
        for start, stop in runs_of(images | videos):
            cursor = start
            while cursor < stop:  # media may stand side by side without text between them
                if bool(videos[cursor]):
                    for frame in range(frames.pop(0)):
                        spans.append(Span("video", cursor, cursor + per_frame, media, frame, self._grid))
                        cursor += per_frame
                else:
                    tokens = pictures.pop(0)
                    spans.append(Span("image", cursor, cursor + tokens, media, 0))
                    cursor += tokens
                media += 1
        return TokenLayout(text_between(spans, images.shape[0]))

    def _picture_tokens(self, inputs: Inputs) -> list[int]:
        """Tokens of each picture, which follow from its shape: of the whole view, and of the tiles without their padding."""
        found = []
        for size in inputs["image_sizes"].tolist() if "image_sizes" in inputs else ():
            tiles = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, self.vision_config.image_size)
            patches = torch.empty(1, *(self._patches * n for n in tiles), device="meta")
            rows, columns = unpad_image(patches, size).shape[1:]
            found.append(self._patches**2 + rows * (columns + 1))
        return found

    @property
    def _grid(self) -> tuple[int, int]:
        side = self._patches // self.config.spatial_pool_stride
        return side, side
