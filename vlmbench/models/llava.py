"""LLaVA-OneVision: SigLIP tower, bilinear pooling per frame, Qwen2 language model with 1-D positions.

A video of T frames gives T × n tokens and one learned newline at its end, which is a separator and no frame's token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.models.base import Features, Inputs, ModelAdapter, runs_of, scatter, text_between


class LlavaOnevision(ModelAdapter):
    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    fixed_resolution: ClassVar[bool] = True

    @property
    def vision_blocks(self) -> Sequence[nn.Module]:
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "encoder", None) or tower.vision_model.encoder  # the wrapper left in later 5.x
        return encoder.layers

    @property
    def vision_config(self) -> Any:
        return self.model.model.vision_tower.config

    @property
    def eager_attention(self) -> Callable[..., Any]:
        return eager_attention_forward

    def _vision_model(self) -> Any:
        return self.model.model.vision_tower

    def process(self, text: str, options: dict[str, Any]) -> Inputs:
        if len({len(video) for video in options.get("videos", ())}) <= 1:
            return super().process(text, options)
        # Videos of different lengths cannot be stacked, and the processor stacks all or nothing: one call for the text
        # and the pictures' numbers, the videos' own tensors left a list.
        raw = dict(self.processor(text=[text], **options))
        videos = raw.pop("pixel_values_videos")
        return {**BatchFeature(raw, tensor_type="pt"), "pixel_values_videos": list(videos)}

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

    def splice(self, inputs: Inputs, features: Features) -> Prompt:
        ids = inputs["input_ids"]
        images, videos = ids == self.config.image_token_id, ids == self.config.video_token_id
        embeds = self.model.get_input_embeddings()(ids)
        embeds = scatter(scatter(embeds, images, features.image), videos, features.video)
        layout = self._layout(ids[0], images[0], videos[0], inputs)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return Prompt(embeds, positions, layout, next_position=ids.shape[1])

    def _layout(self, ids: Tensor, images: Tensor, videos: Tensor, inputs: Inputs) -> TokenLayout:
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
        return TokenLayout(text_between(spans, ids.shape[0]))

    @property
    def _grid(self) -> tuple[int, int]:
        side = -(-(self.vision_config.image_size // self.vision_config.patch_size) // 2)
        return side, side

    @property
    def _tokens_per_frame(self) -> int:
        return self._grid[0] * self._grid[1]
