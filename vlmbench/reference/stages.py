"""What a reference model learns, stage by stage: to see first, then to answer, on clips that grow longer.

Trained jointly from the start, the model stays at chance: the language side gets no usable features and the vision side
no usable gradient. So the tower first learns to write words: a token of a red circle in the top left corner is pulled
towards the embeddings of these words, until they can be read off it. Then it is frozen, its features are computed once,
and the language side finds in its first layers what it would find in text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from vlmbench.reference.build import FRAME, HIDDEN, LLAVA, QWEN, TOKENS_PER_UNIT, Model
from vlmbench.reference.data import IMAGE, Library, Pool
from vlmbench.reference.features import unit_tokens
from vlmbench.reference.prompts import IGNORED, Batch, image_prefix, make_batch, video_prefix
from vlmbench.suites._synth.captions import captions, make_remarks, mixed_questions
from vlmbench.suites._synth.questions import Question, questions, sample_questions
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, Scene, event_range


@dataclass(frozen=True)
class Phase:
    until: float
    """Share of the stage's steps after which the next phase begins."""
    kinds: tuple[str, ...]
    """Drawn from at random, one a step: units of a video, as in ``8``; ``8+text`` with captions; ``image``."""
    pairs: int = 12
    """Questions behind a clip."""
    spans: tuple[int, ...] = (0,)
    """Position ids of a clip are those of a video of this many units (0: no gaps)."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    lr: float
    phases: tuple[Phase, ...]
    tokens: int = 3000
    """Visual tokens in a batch, about."""

    def phase_at(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * self.steps)

    def lr_at(self, step: int) -> float:
        """Of the peak: linear warm-up, then cosine to a fiftieth."""
        warmup = max(1, min(50, self.steps // 10))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * cosine)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights."""

    model: str
    stages: tuple[Stage, ...]
    start: str = ""
    """A shipped model whose language side this one begins with; by default from nothing."""
    pools: dict[str, int] = field(default_factory=lambda: {"32": 2400, IMAGE: 2000})
    """Kind of clip to the number of clips."""
    validation: dict[str, int] = field(default_factory=lambda: {"32": 60, "128": 16, IMAGE: 60})
    seed: int = 0


_LLAVA_SPANS = (0, 0, 64, 128, 256, 384)
_QWEN_SPANS = (0, 0, 32, 64, 128, 192)
RECIPES: dict[str, Recipe] = {
    LLAVA: Recipe(
        LLAVA,
        (
            Stage("vision", 1200, 2e-3, (Phase(1, ("32", "32", IMAGE)),), tokens=1536),
            Stage(
                "language",
                2400,
                3e-3,
                (
                    Phase(0.25, ("4",)),
                    Phase(0.45, ("4", "6", "8", "12", IMAGE, "4+text"), 14, (0, 0, 64)),
                    Phase(0.75, ("6", "8", "12", "16", "24", IMAGE, "8+text", "16+text"), 16, _LLAVA_SPANS),
                    Phase(
                        1,
                        ("8", "16", "24", "32", "64", "128", IMAGE, "16+text", "32+text", "64+text"),
                        20,
                        _LLAVA_SPANS,
                    ),
                ),
            ),
        ),
    ),
    # The vision side writes the same words, so the language side needs to learn the other positions and little else.
    QWEN: Recipe(
        QWEN,
        (
            Stage("vision", 1200, 2e-3, (Phase(1, ("32", "32", IMAGE)),), tokens=1536),
            Stage(
                "language",
                1200,
                1.5e-3,
                (
                    Phase(0.3, ("4", "8", "12", IMAGE, "4+text"), 14, (0, 0, 32)),
                    Phase(0.7, ("4", "8", "12", "16", "24", IMAGE, "8+text", "16+text"), 16, _QWEN_SPANS),
                    Phase(1, ("8", "16", "24", "32", "64", IMAGE, "16+text", "32+text"), 20, _QWEN_SPANS),
                ),
            ),
        ),
        start=LLAVA,
    ),
}


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
        quadrant = own // 8 * 2 + own % 4 // 2
        want_colour, want_shape, want_offset = (x.to(tokens.device)[:, quadrant] for x in vision_targets(scenes))
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


def vision_step(
    model: Model, heads: VisionHeads, pool: Pool, group: int, rng: np.random.Generator, n: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss on `n` units of `group` frames, three in four with something in them."""
    group = min(group, pool.n_frames)
    picked: list[tuple[int, range]] = []
    while len(picked) < n:
        clip, first = int(rng.integers(len(pool.scenes))), int(rng.integers(pool.n_frames // group)) * group
        frames = range(first, first + group)
        busy = any(e.start < frames.stop and frames.start < e.stop for e in pool.scenes[clip].events)
        if busy or len(picked) % 4 == 3:
            picked.append((clip, frames))
    shown = np.stack([pool.frames[clip, frames.start : frames.stop] for clip, frames in picked])
    return heads(unit_tokens(model, shown), [(pool.scenes[clip], frames) for clip, frames in picked])


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


@dataclass(frozen=True)
class Source:
    """Where clips of the language stage come from."""

    model: str
    tokenizer: PreTrainedTokenizerFast
    library: Library
    pictures: Pool
    picture_features: torch.Tensor
    """[N, n, C]."""

    def batch(
        self, kind: str, tokens: int, pairs: int, span: int, rng: np.random.Generator
    ) -> tuple[Batch, torch.Tensor]:
        """Clips that were never shown before, with their features [B, n, C], without newlines."""
        if kind == IMAGE:
            per_clip = self.picture_features.shape[1]
            clips = rng.integers(0, len(self.pictures.scenes), rows_of(per_clip, tokens))
            asked = [sample_questions(questions(self.pictures.scenes[c], rng), rng, pairs) for c in clips]
            features = self.picture_features[torch.from_numpy(clips)]
            return make_batch(image_prefix(self.model), asked, self.tokenizer), features
        n_units, with_text = int(kind.split("+")[0]), kind.endswith("+text")
        size = rows_of(n_units * TOKENS_PER_UNIT, tokens)
        drawn = [self.library.assemble(n_units, _n_events(n_units, rng), rng) for _ in range(size)]
        scenes = [scene for _, scene in drawn]
        asked, texts = ask_all(scenes, with_text, pairs, rng)
        blanks = None
        if span > n_units:
            group = self.library.group
            blanks = torch.stack([gaps(scene, n_units, span, group, with_text, rng) for scene in scenes])
        prefix = video_prefix(self.model, n_units, with_text)
        features = self.library.features[torch.from_numpy(np.stack([rows for rows, _ in drawn]))].flatten(1, 2)
        return make_batch(prefix, asked, self.tokenizer, texts, blanks), features


def rows_of(tokens_per_clip: int, tokens: int) -> int:
    return min(24, max(2, tokens // tokens_per_clip))


def _n_events(n_units: int, rng: np.random.Generator) -> int:
    """As in generated videos of this length; one in five with fewer, for needles."""
    fewest, most = event_range(n_units)
    return int(rng.integers(1 if rng.random() < 0.2 else fewest, most + 1))


def ask_all(
    scenes: list[Scene], with_text: bool, pairs: int, rng: np.random.Generator
) -> tuple[list[list[Question]], list[list[str]] | None]:
    """Up to `pairs` questions on each scene, and its captions."""
    if not with_text:
        return [sample_questions(questions(scene, rng), rng, pairs) for scene in scenes], None
    remarks = [make_remarks(scene) for scene in scenes]
    asked = [
        sample_questions(mixed_questions(scene, said, rng), rng, pairs)
        for scene, said in zip(scenes, remarks, strict=True)
    ]
    return asked, [captions(scene, said) for scene, said in zip(scenes, remarks, strict=True)]


def gaps(scene: Scene, n_units: int, span: int, group: int, with_text: bool, rng: np.random.Generator) -> torch.Tensor:
    """int64 [units + 1] blank units before each unit and at the end, `span` - `n_units` in all.

    Units of one event stay neighbours, and those between two captions as well; all others move apart.
    """
    inside = {u for e in scene.events for u in range(e.start // group + 1, (e.stop - 1) // group + 1)}
    tied = inside | ({u for u in range(n_units) if u * group % 2} if with_text else set())
    loose = [u for u in range(n_units + 1) if u not in tied]
    share = rng.dirichlet(np.ones(len(loose)))
    blanks = torch.zeros(n_units + 1, dtype=torch.long)
    blanks[torch.tensor(loose)] = torch.from_numpy(rng.multinomial(span - n_units, share))
    return blanks


def answer_logits(model: Model, features: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[answer tokens of the batch, V]: teacher-forced, at the positions before each labelled token.

    features: [B, n, C] of the clips, without newlines.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = torch.where(batch.visual[:, None], _spread(features, batch.visual), embeds)
    if batch.newline.any():
        embeds = torch.where(batch.newline[:, None], model.model.image_newline, embeds)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, :-1][batch.labels[:, 1:] != IGNORED])


def _spread(features: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[B, n, C] to [B, L, C] with the features at the n `slots` (bool [L]) and zeros elsewhere."""
    spread = features.new_zeros(features.shape[0], len(slots), HIDDEN)
    return spread.index_copy(1, slots.nonzero().flatten(), features)


def language_step(model: Model, features: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    want = batch.labels[:, 1:]
    want = want[want != IGNORED]
    logits = answer_logits(model, features, batch)
    return F.cross_entropy(logits, want), {"tokens": float((logits.argmax(-1) == want).float().mean())}
