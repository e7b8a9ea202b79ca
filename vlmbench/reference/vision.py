"""The vision stage: tokens from which a frame's content can be read off with the language model's own words."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlmbench.reference.build import FRAME, TOKENS_PER_UNIT, Model
from vlmbench.reference.data import Pool
from vlmbench.reference.features import unit_tokens
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, Scene

QUADRANT = torch.tensor([cell // 8 * 2 + cell % 4 // 2 for cell in range(TOKENS_PER_UNIT)])
"""Of each token of a unit, as an index of PLACES."""


class VisionHeads(nn.Module):
    """From every token of a unit: colour, shape and offset of what is in its quadrant, its quadrant, and its own cell.

    The first two and the quadrant are read with the language model's own word embeddings, which stay as they are.
    Normalised first, because that is how the language model reads a token.
    """

    def __init__(self, words: torch.Tensor) -> None:
        """words: [8 + 4 + 4, C], embeddings of the colours, shapes and places."""
        super().__init__()
        self.words: torch.Tensor
        self.register_buffer("words", F.normalize(words.detach().clone(), dim=-1), persistent=False)
        width = words.shape[1]
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.nothing = nn.Parameter(torch.randn(2, width) / math.sqrt(width))
        self.cell = nn.Linear(width, TOKENS_PER_UNIT, bias=False)
        self.offset = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor, scenes: list[tuple[Scene, range]]) -> tuple[torch.Tensor, dict[str, float]]:
        """tokens: [B, 16, C] of some frames of each scene. The loss, and the accuracies on what is there."""
        z = self.norm(tokens)
        colours, shapes, places = self.words.split((len(COLOURS), len(SHAPES), len(PLACES)))
        colour, shape = z @ torch.cat([colours, self.nothing[:1]]).T, z @ torch.cat([shapes, self.nothing[1:]]).T
        place, cell, offset = z @ places.T, self.cell(z), self.offset(z)
        own = torch.arange(TOKENS_PER_UNIT, device=tokens.device)
        quadrant = QUADRANT.to(tokens.device)
        want_colour, want_shape, want_offset = (x[:, QUADRANT].to(tokens.device) for x in vision_targets(scenes))
        there = want_colour < len(COLOURS)
        loss = F.cross_entropy(colour.flatten(0, 1), want_colour.flatten())
        loss = loss + F.cross_entropy(shape.flatten(0, 1), want_shape.flatten())
        loss = loss + 4 * F.mse_loss(offset[there], want_offset[there])
        loss = loss + 0.5 * F.cross_entropy(place.flatten(0, 1), quadrant.repeat(len(tokens)))
        loss = loss + 0.5 * F.cross_entropy(cell.flatten(0, 1), own.repeat(len(tokens)))
        return loss, {
            "colour": float((colour.argmax(-1) == want_colour)[there].float().mean()),
            "shape": float((shape.argmax(-1) == want_shape)[there].float().mean()),
            "nothing": float((colour.argmax(-1) == want_colour)[~there].float().mean()),
            "offset_px": float((offset.detach()[there] - want_offset[there]).abs().mean() * FRAME / 4),
            "place": float((place.argmax(-1) == quadrant).float().mean()),
            "cell": float((cell.argmax(-1) == own).float().mean()),
        }


def vision_targets(scenes: list[tuple[Scene, range]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By quadrant: colour and shape [B, 4] and offset [B, 4, 2] of the shape's centre, in half quadrants, over its frames."""
    colour = torch.full((len(scenes), 4), len(COLOURS))
    shape = torch.full((len(scenes), 4), len(SHAPES))
    offset = torch.zeros(len(scenes), 4, 2)
    for b, (scene, frames) in enumerate(scenes):
        for event in scene.events:
            seen = [t for t in frames if event.start <= t < event.stop]
            if seen:
                q = PLACES.index(event.place)
                colour[b, q], shape[b, q] = COLOURS.index(event.colour), SHAPES.index(event.shape)
                centre = torch.tensor([event.centre(t) for t in seen]).mean(0) / (FRAME / 4)
                offset[b, q] = centre - torch.tensor([2.0 * (q % 2) + 1, 2.0 * (q // 2) + 1])
    return colour, shape, offset


class Look(NamedTuple):
    """One batch of the vision stage."""

    shown: np.ndarray
    """uint8 [B, group, H, W, 3]."""
    scenes: list[tuple[Scene, range]]
    """Of each, and its frames there."""


def look_at(pool: Pool, group: int, rng: np.random.Generator, n: int) -> Look:
    """`n` units of `group` frames, three in four with something in them."""
    group = min(group, pool.n_frames)
    picked: list[tuple[int, range]] = []
    while len(picked) < n:
        clip, first = int(rng.integers(len(pool.scenes))), int(rng.integers(pool.n_frames // group)) * group
        frames = range(first, first + group)
        busy = any(e.start < frames.stop and frames.start < e.stop for e in pool.scenes[clip].events)
        if busy or len(picked) % 4 == 3:
            picked.append((clip, frames))
    shown = np.stack([pool.frames[clip, frames.start : frames.stop] for clip, frames in picked])
    return Look(shown, [(pool.scenes[clip], frames) for clip, frames in picked])


def vision_step(model: Model, heads: VisionHeads, look: Look) -> tuple[torch.Tensor, dict[str, float]]:
    return heads(unit_tokens(model, look.shown), look.scenes)


@torch.no_grad()
def settle(model: Model, pool: Pool, group: int, n: int = 64, rms: float = 2 * 0.06) -> None:
    """Scale the tokens, by the last layer of the vision side, to about the length of several words' embeddings: they
    leave the vision stage many times as long, and what the language layers add to them would not count.
    """
    linear = model.model.visual.merger.mlp[-1] if _is_qwen(model) else model.model.multi_modal_projector.linear_2
    shown = np.array(pool.frames[:n]).reshape(-1, group, FRAME, FRAME, 3)
    scale = rms / unit_tokens(model, shown).square().mean().sqrt()
    linear.weight.mul_(scale)
    linear.bias.mul_(scale)


def vision_parameters(model: Model) -> list[nn.Parameter]:
    if _is_qwen(model):
        return list(model.model.visual.parameters())
    return [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]


def _is_qwen(model: Model) -> bool:
    return model.config.model_type == "qwen2_5_vl"
