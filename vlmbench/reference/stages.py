"""What a reference model learns, stage by stage: to see first, then to answer, on clips that grow longer.

Trained jointly from the start, the model stays at chance: the language side gets no usable features and the vision side
no usable gradient. So the tower first learns to write words: a token of a red circle in the top left corner is pulled
towards the embeddings of these words, until they can be read off it. Then it is frozen, its features are computed once,
and the language side finds in its first layers what it would find in text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from vlmbench.reference.build import FRAME, HIDDEN, LLAVA, QWEN, TOKENS_PER_UNIT, Model
from vlmbench.reference.data import IMAGE, Library, Pool
from vlmbench.reference.features import unit_tokens
from vlmbench.reference.prompts import IGNORED, Batch, Prefix, image_prefix, make_batch, video_prefix
from vlmbench.suites._synth.captions import (
    ANIMAL_WORD,
    ANIMALS,
    EVERY,
    NUMBER_WORD,
    WORDS,
    captions,
    make_remarks,
    mixed_questions,
)
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
    hints: tuple[float, float] = (0.0, 0.0)
    """Weights of the hints on order and on remarks; from the start they would stand in the way of the first look-ups."""
    focus: bool = False
    """Whether types of question count as the recipe's `focus` says."""


FOCUS = {
    **dict.fromkeys(("before", "which_first", "says", "speaker", "beside"), 2.0),
    **dict.fromkeys(("motion", "count"), 0.25),
}
"""Weights of types of question where a phase asks for them: what is learned last counts more, what is not gated less."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    lr: float
    phases: tuple[Phase, ...]
    tokens: int = 3000
    """Visual tokens in a batch, about."""
    horizon: int | None = None
    """Steps after which the rate would reach its end; more than `steps` where the next stage goes on sooner."""

    def phase_at(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * (self.horizon or self.steps))

    def lr_at(self, step: int) -> float:
        """Of the peak: linear warm-up, then cosine to a fiftieth."""
        horizon = self.horizon or self.steps
        warmup = max(1, min(50, horizon // 10))
        cosine = 0.5 * (1 + math.cos(math.pi * step / horizon))
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
    focus: dict[str, float] = field(default_factory=lambda: FOCUS)
    """Weight of a type of question in the phases that ask for it."""
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
                1800,
                3e-3,
                (
                    Phase(0.25, ("4",)),
                    Phase(0.375, ("4", "6", "8", "12", IMAGE, "4+text"), 14, (0, 0, 64)),
                    Phase(0.5, ("4", "6", "8", "12", IMAGE, "4+text"), 14, (0, 0, 64), (0.2, 0)),
                    Phase(0.625, ("6", "8", "12", "16", "24", IMAGE, "8+text", "16+text"), 16, _LLAVA_SPANS, (0.2, 0)),
                    Phase(
                        0.75,
                        ("8", "12", "16", "24", "32", "4+text", "8+text", "8+text", "16+text"),
                        18,
                        _LLAVA_SPANS,
                        (0.2, 0),
                    ),
                ),
                horizon=2400,
            ),
            Stage(
                "remarks",
                300,
                2e-3,
                (Phase(1, ("6", "8", "12", "4+text", "8+text"), 16, _LLAVA_SPANS, (0.1, 0.3)),),
                horizon=900,
            ),
            Stage(
                "length",
                1000,
                1.5e-3,
                (
                    Phase(0.5, ("6", "8", "12", "16", "4+text", "8+text"), 18, _LLAVA_SPANS, (0.4, 0.2), True),
                    Phase(0.8, ("8", "12", "16", "32", IMAGE, "8+text", "16+text"), 20, _LLAVA_SPANS, (0.2, 0.1), True),
                    Phase(
                        1,
                        ("8", "16", "32", "64", "128", IMAGE, "8+text", "16+text", "32+text", "64+text"),
                        20,
                        _LLAVA_SPANS,
                        (0.1, 0.1),
                        True,
                    ),
                ),
            ),
        ),
    ),
    # The vision side writes the same words, so the language side needs to learn the other positions and little else.
    QWEN: Recipe(
        QWEN,
        (
            Stage("vision", 900, 2e-3, (Phase(1, ("32", "32", IMAGE)),), tokens=1536),
            Stage(
                "language",
                700,
                1.5e-3,
                (
                    Phase(0.3, ("4", "8", "12", IMAGE, "4+text"), 14, (0, 0, 32), (0.1, 0.2), True),
                    Phase(
                        0.75,
                        ("4", "8", "12", "16", "24", IMAGE, "4+text", "8+text", "16+text"),
                        16,
                        _QWEN_SPANS,
                        (0.1, 0.2),
                        True,
                    ),
                    Phase(
                        1,
                        ("8", "16", "24", "32", "64", IMAGE, "8+text", "16+text", "32+text"),
                        20,
                        _QWEN_SPANS,
                        (0.1, 0.1),
                        True,
                    ),
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


class HintHeads(nn.Module):
    """What a token should have found out half-way up the language model: linear reads that are thrown away afterwards.

    Questions alone take thousands of steps to teach that the token of an event should look up its predecessor across blank
    frames, or a number who said it; asked of every such token, it is learned with the first look-ups.
    """

    DEPTH = 3
    """Layers below, so that as many are left to use what was found."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.norm = nn.RMSNorm(HIDDEN, elementwise_affine=False)
        self.read = nn.Linear(HIDDEN, sum(sizes))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden: [B, n, C]; targets: int64 [B, n, len(sizes)], IGNORED where there is nothing to know."""
        there = (targets != IGNORED).any(-1)
        read = self.read(self.norm(hidden[there])).split(self.sizes, -1)
        wanted = targets[there].unbind(-1)
        losses = [
            F.cross_entropy(logits, want, ignore_index=IGNORED) for logits, want in zip(read, wanted, strict=True)
        ]
        return torch.stack(losses).mean()


ORDER_SIZES = (len(COLOURS) + 1, len(SHAPES) + 1, 8)
"""Colour and shape of the event before (the last class: there is none), and the number of events up to here."""
REMARK_SIZES = (len(ANIMALS), len(COLOURS) + 1, len(SHAPES) + 1)
"""Who says this number, and colour and shape of the latest event."""


def order_targets(scenes: list[Scene], n_units: int, group: int) -> torch.Tensor:
    """int64 [B, units · 16, 3], as in ORDER_SIZES, at the four tokens of an event's quadrant in each unit that shows it."""
    found = torch.full((len(scenes), n_units, TOKENS_PER_UNIT, 3), IGNORED)
    own = torch.arange(TOKENS_PER_UNIT)
    quadrant = own // 8 * 2 + own % 4 // 2
    for b, scene in enumerate(scenes):
        before = (len(COLOURS), len(SHAPES))
        for number, event in enumerate(scene.events):
            tokens = (quadrant == PLACES.index(event.place)).nonzero().flatten()
            for unit in range(event.start // group, (event.stop - 1) // group + 1):
                found[b, unit, tokens] = torch.tensor([*before, number])
            before = COLOURS.index(event.colour), SHAPES.index(event.shape)
    return found.flatten(1, 2)


def remark_targets(scenes: list[Scene], prefix: Prefix, width: int) -> torch.Tensor:
    """int64 [B, width, 3], as in REMARK_SIZES: at the number of every remark, and but for the first also at its animal."""
    found = torch.full((len(scenes), width, 3), IGNORED)
    words = [i for i, token in enumerate(prefix.tokens) if not token]
    for b, scene in enumerate(scenes):
        for remark in make_remarks(scene):
            animal, number = (words[remark.caption * WORDS + place] for place in (ANIMAL_WORD, NUMBER_WORD))
            seen = [event for event in scene.events if event.start < (remark.caption + 1) * EVERY]
            colour = COLOURS.index(seen[-1].colour) if seen else len(COLOURS)
            shape = SHAPES.index(seen[-1].shape) if seen else len(SHAPES)
            found[b, animal] = torch.tensor([IGNORED, colour, shape])
            found[b, number] = torch.tensor([ANIMALS.index(remark.animal), colour, shape])
    return found


class Lesson(NamedTuple):
    """One batch of the language stage."""

    batch: Batch
    features: torch.Tensor
    """[B, n, C] of the clips, without newlines."""
    order: torch.Tensor | None
    """int64 [B, n, 3], see `order_targets`; none for pictures."""
    remarks: torch.Tensor | None
    """int64 [B, L, 3], see `remark_targets`; none without captions."""

    def to(self, device: torch.device | str) -> Lesson:
        order, remarks = (None if each is None else each.to(device) for each in (self.order, self.remarks))
        return Lesson(self.batch.to(device), self.features.to(device), order, remarks)


@dataclass(frozen=True)
class Source:
    """Where clips of the language stage come from."""

    model: str
    tokenizer: PreTrainedTokenizerFast
    library: Library
    pictures: Pool
    picture_features: torch.Tensor
    """[N, n, C]."""

    def lesson(self, kind: str, tokens: int, pairs: int, span: int, rng: np.random.Generator) -> Lesson:
        """Clips that were never shown before, about `tokens` visual tokens of them."""
        if kind == IMAGE:
            per_clip = self.picture_features.shape[1]
            clips = rng.integers(0, len(self.pictures.scenes), rows_of(per_clip, tokens))
            asked = [sample_questions(questions(self.pictures.scenes[c], rng), rng, pairs) for c in clips]
            features = self.picture_features[torch.from_numpy(clips)]
            return Lesson(make_batch(image_prefix(self.model), asked, self.tokenizer), features, None, None)
        n_units, with_text = int(kind.split("+")[0]), kind.endswith("+text")
        size, group = rows_of(n_units * TOKENS_PER_UNIT, tokens), self.library.group
        drawn = [self.library.assemble(n_units, _n_events(n_units, rng), rng) for _ in range(size)]
        scenes = [scene for _, scene in drawn]
        asked, texts = ask_all(scenes, with_text, pairs, rng)
        blanks = None
        if span > n_units:
            blanks = torch.stack([gaps(scene, n_units, span, group, with_text, rng) for scene in scenes])
        prefix = video_prefix(self.model, n_units, with_text)
        batch = make_batch(prefix, asked, self.tokenizer, texts, blanks)
        remarks = remark_targets(scenes, prefix, batch.ids.shape[1]) if with_text else None
        features = self.library.features[torch.from_numpy(np.stack([rows for rows, _ in drawn]))].flatten(1, 2)
        return Lesson(batch, features, order_targets(scenes, n_units, group), remarks)


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
    """int64 [units + 1] blank units before each unit and at the end, `span` - `n_units` in all; with captions blank media.

    Units of one event or medium stay neighbours; all others move apart.
    """
    per_medium = EVERY // group if with_text else 1
    inside = {u for e in scene.events for u in range(e.start // group + 1, (e.stop - 1) // group + 1)}
    loose = [u for u in range(0, n_units + 1, per_medium) if u not in inside]
    blanks = torch.zeros(n_units + 1, dtype=torch.long)
    share = rng.dirichlet(np.ones(len(loose)))
    blanks[torch.tensor(loose)] = torch.from_numpy(rng.multinomial((span - n_units) // per_medium, share))
    return blanks


def hidden_states(model: Model, features: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Of the language model, [B, L, C] each: its input, every layer's output, the last one normalised."""
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = torch.where(batch.visual[:, None], _spread(features, batch.visual), embeds)
    if batch.newline.any():
        embeds = torch.where(batch.newline[:, None], model.model.image_newline, embeds)
    found = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return tuple(found.hidden_states)


def answer_logits(model: Model, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[answer tokens of the batch, V]: teacher-forced, at the positions before each labelled token.

    hidden: [B, L, C], the last of `hidden_states`.
    """
    return model.lm_head(hidden[:, :-1][batch.labels[:, 1:] != IGNORED])


def _spread(features: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[B, n, C] to [B, L, C] with the features at the n `slots` (bool [L]) and zeros elsewhere."""
    spread = features.new_zeros(features.shape[0], len(slots), HIDDEN)
    return spread.index_copy(1, slots.nonzero().flatten(), features)


def language_step(
    model: Model, order: HintHeads, remark: HintHeads, lesson: Lesson, phase: Phase, focus: Mapping[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss on the answers, and with the phase's weights on what `order` and `remark` ask."""
    hints = phase.hints
    batch = lesson.batch
    want = batch.labels[:, 1:]
    want = want[want != IGNORED]
    hidden = hidden_states(model, lesson.features, batch)
    logits = answer_logits(model, hidden[-1], batch)
    each = F.cross_entropy(logits, want, reduction="none")
    loss = (each * batch.answer_weights(focus)).mean() if phase.focus else each.mean()
    seen = {"answers": each.mean().item(), "tokens": float((logits.argmax(-1) == want).float().mean())}
    half_way = hidden[HintHeads.DEPTH]
    if lesson.order is not None and hints[0]:
        asked = order(half_way[:, batch.visual], lesson.order)
        loss, seen["order"] = loss + hints[0] * asked, asked.item()
    if lesson.remarks is not None and hints[1]:
        asked = remark(half_way, lesson.remarks)
        loss, seen["remark"] = loss + hints[1] * asked, asked.item()
    return loss, seen
