"""What the model learns, stage by stage: to see first, then to answer, then to answer at positions far away.

Trained jointly from the start, the model stays at chance: the language side gets no usable features and the vision side
no usable gradient. So the tower first learns, with heads that are thrown away, what stands in each quadrant and where
each of its tokens lies; then it is frozen, its features are computed once, and only the language side trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

from vlmbench.reference.build import FRAME, TOKENS_PER_FRAME
from vlmbench.reference.data import IGNORED, IMAGE, Batch, Pool, to_pixels
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, Scene


@dataclass(frozen=True)
class Phase:
    until: float
    """Share of the stage's steps after which the next phase begins."""
    pools: tuple[str, ...]
    """Drawn from at random, one pool a step."""
    pairs: int = 12
    """Questions behind a clip."""
    types: tuple[str, ...] | None = None
    """Of the questions; None means all."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    lr: float
    phases: tuple[Phase, ...]
    tokens: int = 3000
    """Visual tokens in a batch, about."""
    spans: tuple[int, ...] = (0,)
    """Position ids of the clip are drawn from this many frames (0: no gaps)."""

    def phase_at(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * self.steps)

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine to a twentieth."""
        warmup = max(1, min(100, self.steps // 10))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * cosine)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights."""

    model: str
    stages: tuple[Stage, ...]
    pools: dict[str, int] = field(default_factory=lambda: {"4": 5000, "8": 3000, "16": 2000, "32": 2400, IMAGE: 2000})
    """Kind of clip to the number of clips."""
    validation: int = 120
    """Clips of each validation pool."""
    seed: int = 0


STAGES = {
    "tiny-llava-ov": (
        Stage("vision", 1200, 2e-3, (Phase(1, ("32", IMAGE)),), tokens=1536),
        Stage(
            "language",
            1500,
            1.5e-3,
            (
                Phase(0.2, ("4",)),
                Phase(0.33, ("4", "8", IMAGE)),
                Phase(0.53, ("4", "8")),
                Phase(0.73, ("8", "16", IMAGE), pairs=14),
                Phase(1, ("8", "16", "32", "32", IMAGE), pairs=14),
            ),
        ),
        Stage("long", 300, 6e-4, (Phase(1, ("8", "16", "32", IMAGE)),), spans=(0, 64, 128, 256, 384)),
    )
}
"""What was run for the shipped weights, run by run, is in their ``training.json``; `long` has not been run yet."""


class VisionHeads(nn.Module):
    """From every token of a frame: colour, shape and offset of what is in its quadrant, and the token's own place.

    Normalised first, because that is how the language model reads it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 2, TOKENS_PER_FRAME)
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: torch.Tensor, scenes: list[tuple[Scene, int]]) -> tuple[torch.Tensor, dict[str, float]]:
        """tokens: [B, 16, C] of frame `t` of each scene. The loss, and the accuracies on what is there."""
        colour, shape, offset, place = self.read(self.norm(tokens)).split(self.sizes, -1)  # [B, 16, …]
        own = torch.arange(TOKENS_PER_FRAME, device=tokens.device)
        quadrant = own // 8 * 2 + own % 4 // 2
        want_colour, want_shape, want_offset = (x.to(tokens.device)[:, quadrant] for x in self._targets(scenes))
        want_place = own.expand(len(tokens), -1)
        there = want_colour < len(COLOURS)
        loss = F.cross_entropy(colour.flatten(0, 1), want_colour.flatten())
        loss = loss + F.cross_entropy(shape.flatten(0, 1), want_shape.flatten())
        loss = loss + 4 * F.mse_loss(offset[there], want_offset[there])
        loss = loss + F.cross_entropy(place.flatten(0, 1), want_place.flatten())
        return loss, {
            "colour": float((colour.argmax(-1) == want_colour)[there].float().mean()),
            "shape": float((shape.argmax(-1) == want_shape)[there].float().mean()),
            "nothing": float((colour.argmax(-1) == want_colour)[~there].float().mean()),
            "offset_px": float((offset.detach()[there] - want_offset[there]).abs().mean() * FRAME / 4),
            "place": float((place.argmax(-1) == want_place).float().mean()),
        }

    def _targets(self, scenes: list[tuple[Scene, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        colour = torch.full((len(scenes), 4), len(COLOURS))
        shape = torch.full((len(scenes), 4), len(SHAPES))
        offset = torch.zeros(len(scenes), 4, 2)  # of the shape's centre from the quadrant's, in half quadrants
        for b, (scene, t) in enumerate(scenes):
            for event in scene.events:
                if event.start <= t < event.stop:
                    q = PLACES.index(event.place)
                    colour[b, q], shape[b, q] = COLOURS.index(event.colour), SHAPES.index(event.shape)
                    centre = torch.tensor(event.centre(t)) / (FRAME / 4)
                    offset[b, q] = centre - torch.tensor([2.0 * (q % 2) + 1, 2.0 * (q // 2) + 1])
        return colour, shape, offset


def vision_parameters(model: LlavaOnevisionForConditionalGeneration) -> list[nn.Parameter]:
    return [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]


def vision_step(
    model: LlavaOnevisionForConditionalGeneration, heads: VisionHeads, pool: Pool, rng: np.random.Generator, n: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss on `n` frames, three in four with something in them."""
    picked: list[tuple[int, int]] = []
    while len(picked) < n:
        clip, t = int(rng.integers(len(pool.scenes))), int(rng.integers(pool.n_frames))
        if any(e.start <= t < e.stop for e in pool.scenes[clip].events) or len(picked) % 4 == 3:
            picked.append((clip, t))
    pixels = to_pixels(np.stack([pool.frames[clip, t] for clip, t in picked]))
    return heads(frame_tokens(model, pixels.to(model.device)), [(pool.scenes[clip], t) for clip, t in picked])


@torch.no_grad()
def settle(model: LlavaOnevisionForConditionalGeneration, pool: Pool, n: int = 64, rms: float = 0.2) -> None:
    """Centre and scale the tokens, by the projector's last layer: they leave the vision stage some hundred times as
    long as word embeddings, and what the language layers add to them would not count.
    """
    linear = model.model.multi_modal_projector.linear_2
    pixels = to_pixels(pool.frames[:n].reshape(-1, FRAME, FRAME, 3)).to(model.device)
    tokens = frame_tokens(model, pixels).flatten(0, 1)
    centre = tokens.mean(0)
    scale = rms / (tokens - centre).square().mean().sqrt()
    linear.weight.mul_(scale)
    linear.bias.sub_(centre).mul_(scale)


def frame_tokens(model: LlavaOnevisionForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] to [B, 16, C], as in a video, without the newline that ends it."""
    return model.model.get_video_features(pixels[:, None], return_dict=True).pooler_output[:, :TOKENS_PER_FRAME]


def picture_tokens(model: LlavaOnevisionForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] to [B, 136, C]: the whole picture, then its only tile, which is the same here, row by row."""
    tiles = pixels[:, None].expand(-1, 2, -1, -1, -1)
    sizes = torch.full((len(pixels), 2), FRAME)
    return torch.stack(list(model.model.get_image_features(tiles, sizes, return_dict=True).pooler_output))


@torch.no_grad()
def pool_features(model: LlavaOnevisionForConditionalGeneration, pool: Pool, chunk: int = 512) -> torch.Tensor:
    """What the frozen vision side makes of every clip, [N, n, C]: n visual tokens, without the newline of a video."""
    encode = frame_tokens if pool.kind != IMAGE else picture_tokens
    flat = pool.frames.reshape(-1, *pool.frames.shape[2:])
    starts = range(0, len(flat), chunk)
    parts = [encode(model, to_pixels(flat[start : start + chunk]).to(model.device)) for start in starts]
    return torch.cat(parts).reshape(len(pool.scenes), -1, parts[0].shape[-1])


def answer_logits(model: LlavaOnevisionForConditionalGeneration, features: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[answer tokens of the batch, V]: teacher-forced, at the positions before each labelled token."""
    embeds = model.get_input_embeddings()(batch.ids)
    visual = features[batch.clips]
    if int(batch.ids[0, 1]) == model.config.video_token_id:
        visual = torch.cat([visual, model.model.image_newline.expand(len(visual), 1, -1)], 1)
    embeds = torch.cat([embeds[:, :1], visual, embeds[:, 1 + visual.shape[1] :]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, :-1][batch.labels[:, 1:] != IGNORED])


def language_step(
    model: LlavaOnevisionForConditionalGeneration, features: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, dict[str, float]]:
    want = batch.labels[:, 1:]
    want = want[want != IGNORED]
    logits = answer_logits(model, features, batch)
    return F.cross_entropy(logits, want), {"tokens": float((logits.argmax(-1) == want).float().mean())}
