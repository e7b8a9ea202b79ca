"""From decoded frames to visual tokens, many clips at once, as the processor and the model make them for one."""

from __future__ import annotations

import numpy as np
import torch

from vlmbench.reference.build import FRAME, MEAN_STD, PAIR, PATCH, TOKENS_PER_UNIT, Model
from vlmbench.reference.data import IMAGE, Pool
from vlmbench.reference.prompts import LLAVA_NEWLINES


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W], normalised as the processor does."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD)
    return (torch.from_numpy(np.array(frames)).movedim(-1, -3).float() / 255 - mean) / std


def group_of(model: Model) -> int:
    """Frames of a unit."""
    return PAIR if model.config.model_type == "qwen2_5_vl" else 1


def unit_tokens(model: Model, frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, group, H, W, 3] to [B, 16, C], without the newline that ends a video."""
    pixels = to_pixels(frames).to(model.device)
    if group_of(model) == 1:
        return model.model.get_video_features(pixels, return_dict=True).pooler_output[:, :TOKENS_PER_UNIT]
    if pixels.shape[1] < PAIR:  # a picture: the processor shows it twice
        pixels = pixels.expand(-1, PAIR, -1, -1, -1)
    # One long video: no unit sees another.
    grid = torch.tensor([[len(pixels), FRAME // PATCH, FRAME // PATCH]], device=model.device)
    found = model.model.get_video_features(pair_patches(pixels), grid, return_dict=True).pooler_output
    return torch.cat(list(found)).unflatten(0, (len(pixels), TOKENS_PER_UNIT))


def pair_patches(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 2, 3, H, W] to [B · 64, 3 · 2 · 8 · 8]: rows of patches in the processor's order, 2×2 neighbours together."""
    half = FRAME // PATCH // 2
    x = pixels.reshape(-1, PAIR, 3, half, 2, PATCH, half, 2, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * PAIR * PATCH * PATCH)


def picture_tokens(model: Model, frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, 1, H, W, 3] to [B, n, C], without newlines. LLaVA-OneVision: the whole picture, then its only tile."""
    if group_of(model) > 1:
        return unit_tokens(model, frames)
    tiles = to_pixels(frames).to(model.device).expand(-1, 2, -1, -1, -1)
    sizes = torch.full((len(tiles), 2), FRAME)
    found = torch.stack(list(model.model.get_image_features(tiles, sizes, return_dict=True).pooler_output))
    return found[:, ~torch.tensor(LLAVA_NEWLINES)]


@torch.no_grad()
def pool_features(model: Model, pool: Pool, chunk: int = 512) -> torch.Tensor:
    """What the vision side makes of every clip: [N, units, 16, C], of pictures [N, n, C]."""
    if pool.kind == IMAGE:
        parts = [picture_tokens(model, pool.frames[i : i + chunk]) for i in range(0, len(pool.scenes), chunk)]
        return torch.cat(parts)
    group = group_of(model)
    units = pool.frames.reshape(-1, group, *pool.frames.shape[2:])
    parts = [unit_tokens(model, units[i : i + chunk]) for i in range(0, len(units), chunk)]
    return torch.cat(parts).unflatten(0, (len(pool.scenes), -1))
