"""Qwen2-VL and Qwen2.5-VL: own vision tower with 2×2 merging, M-RoPE language model.

A temporal unit is two sampled frames. Outside flash attention the stock tower attends to every frame or window in a
Python loop; here chunks of equal length go through one batched call, for all methods alike, so that the dense vision
time is no straw man.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision, eager_attention_forward

from vlmbench.chunked import pieces_of
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.models.base import Features, Inputs, ModelAdapter, runs_of, scatter, text_between


class QwenVL(ModelAdapter):
    name: ClassVar[str] = "qwen_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    fixed_resolution: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        super().__init__(model, processor)
        batch_chunks(self.model.model.visual)

    @property
    def vision_blocks(self) -> Sequence[nn.Module]:
        return self.model.model.visual.blocks

    @property
    def vision_config(self) -> Any:
        return self.model.model.visual.config

    @property
    def eager_attention(self) -> Callable[..., Any]:
        return eager_attention_forward

    def _vision_model(self) -> Any:
        return self.model.model.visual

    def encode_vision(self, inputs: Inputs) -> Features:
        core = self.model.model
        image = video = None
        if "pixel_values" in inputs:
            image = torch.cat(
                core.get_image_features(
                    inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
                ).pooler_output
            )
        if "pixel_values_videos" in inputs:
            pieces = pieces_of(self.vision_blocks, inputs["pixel_values_videos"], inputs["video_grid_thw"])
            found = [core.get_video_features(*piece, return_dict=True).pooler_output for piece in pieces]
            video = torch.cat([each for piece in found for each in piece])
        return Features(image, video)

    def splice(self, inputs: Inputs, features: Features) -> Prompt:
        ids = inputs["input_ids"]
        images, videos = ids == self.config.image_token_id, ids == self.config.video_token_id
        embeds = self.model.get_input_embeddings()(ids)
        embeds = scatter(scatter(embeds, images, features.image), videos, features.video)
        # Explicit positions: `model.rope_deltas`, which the stock forward leaves behind, would survive into the next sample.
        layout = self._layout(images[0], videos[0], inputs)
        positions = mrope_positions(layout, self._time_steps(inputs)).to(ids.device)
        return Prompt(embeds, positions[:, None], layout, next_position=int(positions.max()) + 1)

    def _time_steps(self, inputs: Inputs) -> list[float]:
        """Temporal position ids from one unit of each video to the next: seconds count from Qwen2.5-VL on."""
        if self.config.model_type == "qwen2_vl" or "video_grid_thw" not in inputs:
            return [1.0] * len(inputs.get("video_grid_thw", ()))
        seconds = inputs.get("second_per_grid_ts")
        per_second = self.vision_config.tokens_per_second
        return [
            float(s) * per_second for s in (seconds if seconds is not None else [1.0] * len(inputs["video_grid_thw"]))
        ]

    def decode_positions(self, position: int) -> Tensor:
        return torch.full((3, 1, 1), position, device=self.device)

    def _layout(self, images: Tensor, videos: Tensor, inputs: Inputs) -> TokenLayout:
        grids = {kind: inputs.get(f"{kind}_grid_thw") for kind in ("image", "video")}
        queue = {kind: [] if grid is None else grid.tolist() for kind, grid in grids.items()}
        merge = self.vision_config.spatial_merge_size
        spans: list[Span] = []
        # Every medium stands between its own vision-start and vision-end tokens, so runs are whole media.
        for media, (start, _) in enumerate(runs_of(images | videos)):
            kind = "video" if bool(videos[start]) else "image"
            units, height, width = queue[kind].pop(0)
            grid = (height // merge, width // merge)
            per_unit = grid[0] * grid[1]
            for unit in range(units):
                first = start + unit * per_unit
                spans.append(Span(kind, first, first + per_unit, media, unit, grid))  # type: ignore[arg-type]
        return TokenLayout(text_between(spans, images.shape[0]))


class _Chunks(NamedTuple):
    order: Tensor
    """int64 ``[n_chunks, length]``: token indices of every chunk of one length."""


class _ChunkPlans:
    """Groups of equal chunks for the last two `cu_seqlens` seen (frames and windows), found by identity."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, list[_Chunks]]] = []

    def of(self, cu_seqlens: Tensor) -> list[_Chunks]:
        for tensor, plan in self._known:
            if tensor is cu_seqlens:
                return plan
        starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        plan = [
            _Chunks(starts[lengths == length][:, None] + torch.arange(int(length), device=cu_seqlens.device))
            for length in lengths.unique().tolist()
            if length
        ]
        self._known = [*self._known[-1:], (cu_seqlens, plan)]
        return plan


def mrope_positions(layout: TokenLayout, time_steps: Sequence[float]) -> Tensor:
    """int64 ``[3, N]``: time, height and width of every token (Qwen2-VL, section 2.1, M-RoPE; Qwen2.5-VL, section 2.1.2).

    What follows a medium begins one above its largest id on any axis. transformers from 5.3 to 5.23 counts only height
    and width there, so that the text behind a long video falls among the times of its frames, where no published
    checkpoint was trained to find it; it also cuts a unit's seconds to a whole number before it multiplies. `time_steps`
    has one entry a video.
    """
    found: list[Tensor] = []
    cursor, steps = 0, iter(time_steps)
    for media, spans in itertools.groupby(layout.spans, key=lambda span: None if span.kind == "text" else span.media):
        if media is None:
            length = sum(span.stop - span.start for span in spans)
            found.append((cursor + torch.arange(length)).expand(3, -1))
        else:
            units = list(spans)
            step = next(steps) if units[0].kind == "video" else 1.0
            height, width = units[0].grid or (1, units[0].stop - units[0].start)
            time = (torch.arange(len(units)) * step).long()
            axes = torch.meshgrid(time, torch.arange(height), torch.arange(width), indexing="ij")
            found.append(cursor + torch.stack([axis.flatten() for axis in axes]))
        cursor = int(found[-1].max()) + 1
    return torch.cat(found, 1)


def batch_chunks(visual: Any) -> None:
    """Let the tower's attention take all chunks of one length in one call."""
    plans = _ChunkPlans()
    for block in visual.blocks:
        block.attn.forward = _batched_forward(block.attn, plans)


def _batched_forward(attention: Any, plans: _ChunkPlans) -> Callable[..., Tensor]:
    """The stock forward with its loop over chunks replaced by one call for each distinct chunk length."""
    stock = attention.forward

    def forward(
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor:
        name = attention.config._attn_implementation
        if "flash" in name:  # variable-length kernels take all chunks at once already
            return stock(hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        kwargs.pop("max_seqlen", None)
        attend = eager_attention_forward if name == "eager" else AttentionInterface()[name]
        n = hidden_states.shape[0]
        q, k, v = attention.qkv(hidden_states).reshape(n, 3, attention.num_heads, -1).unbind(1)  # each [N, H, D]
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        out = torch.empty_like(v)
        for chunk in plans.of(cu_seqlens):
            batch = [tensor[chunk.order].transpose(1, 2) for tensor in (q, k, v)]  # each [chunks, H, length, D]
            mixed, _ = attend(
                attention,
                *batch,
                attention_mask=None,
                scaling=attention.scaling,
                dropout=0.0,
                is_causal=False,
                **kwargs,
            )
            out[chunk.order] = mixed.to(out.dtype)  # [chunks, length, H, D]
        return attention.proj(out.reshape(n, -1))

    return forward
