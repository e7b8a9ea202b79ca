"""What the LLaVAs share: a ViT of one input size, features of one of its layers, a language model with 1-D positions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from vlmbench.layout import Prompt, TokenLayout
from vlmbench.models.base import Features, Inputs, ModelAdapter, scatter


class LlavaFamily(ModelAdapter):
    fixed_resolution: ClassVar[bool] = True

    @property
    def vision_blocks(self) -> Sequence[nn.Module]:
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "encoder", None) or tower.vision_model.encoder  # the wrapper left in later 5.x
        return encoder.layers

    @property
    def vision_config(self) -> Any:
        return self.model.model.vision_tower.config

    def _vision_model(self) -> Any:
        return self.model.model.vision_tower

    def process(self, text: str, options: dict[str, Any]) -> Inputs:
        if len({len(video) for video in options.get("videos", ())}) <= 1:
            return super().process(text, options)
        # Videos of different lengths cannot be stacked, and the processor stacks all or nothing: one call for the text
        # and the pictures' numbers, the videos' own tensors left a list.
        raw = dict(self.processor(text=[text], return_tensors=None, **options))
        videos = raw.pop("pixel_values_videos")
        return {**BatchFeature(raw, tensor_type="pt"), "pixel_values_videos": list(videos)}

    def splice(self, inputs: Inputs, features: Features) -> Prompt:
        ids = inputs["input_ids"]
        images, videos = self._placeholders(inputs)
        embeds = self.model.get_input_embeddings()(ids)
        embeds = scatter(scatter(embeds, images, features.image), videos, features.video)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return Prompt(embeds, positions, self._layout(images[0], videos[0], inputs), next_position=ids.shape[1])

    def _placeholders(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Where a picture's and a video's features go, each bool ``[1, N]``."""
        ids = inputs["input_ids"]
        return ids == self.config.image_token_id, ids == self.config.video_token_id

    @abstractmethod
    def _layout(self, images: Tensor, videos: Tensor, inputs: Inputs) -> TokenLayout:
        """The spans, from the placeholders, each bool ``[N]``."""

    @property
    def _patches(self) -> int:
        """Along a side of the tower's input."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    @abstractmethod
    def _grid(self) -> tuple[int, int]:
        """(rows, columns) of a video frame's tokens."""

    @property
    def _tokens_per_frame(self) -> int:
        return self._grid[0] * self._grid[1]
