"""The language stages: clips that were never shown before, questions about them, and the loss on the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from vlmbench.reference.build import HIDDEN, TOKENS_PER_UNIT, Model
from vlmbench.reference.data import IMAGE, Library, Pool
from vlmbench.reference.hints import (
    DEPTH,
    NAMED_DEPTH,
    REMARK_DEPTH,
    OrderHeads,
    RemarkHeads,
    named_targets,
    order_targets,
    remark_targets,
    said_loss,
    said_targets,
)
from vlmbench.reference.prompts import IGNORED, Batch, image_prefix, make_batch, video_prefix
from vlmbench.reference.recipes import Phase, type_weights
from vlmbench.suites._synth.captions import EVERY, captions, make_remarks, mixed_questions
from vlmbench.suites._synth.questions import Question, questions, sample_questions
from vlmbench.suites._synth.scene import Scene, event_range


class Lesson(NamedTuple):
    """One batch of the language stage."""

    batch: Batch
    features: torch.Tensor
    """[B, n, C] of the clips, without newlines."""
    order: torch.Tensor | None
    """int64 [B, n, 3], see `order_targets`; none for pictures."""
    named: torch.Tensor | None
    """int64 [B, L, 3], see `named_targets`; none for pictures."""
    remarks: torch.Tensor | None
    """int64 [B, L, 4], see `remark_targets`; none without captions."""
    said: torch.Tensor | None
    """int64 [B, L], see `said_targets`; none without captions."""

    def to(self, device: torch.device | str) -> Lesson:
        hints = (None if each is None else each.to(device) for each in self[2:])
        return Lesson(self.batch.to(device), self.features.to(device), *hints)


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
            return Lesson(make_batch(image_prefix(self.model), asked, self.tokenizer), features, None, None, None, None)
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
        remarks = said = None
        if with_text:
            remarks = remark_targets(scenes, prefix, batch, self.tokenizer)
            said = said_targets(asked, batch, self.tokenizer)
        features = self.library.features[torch.from_numpy(np.stack([rows for rows, _ in drawn]))].flatten(1, 2)
        named = named_targets(scenes, batch, self.tokenizer)
        return Lesson(batch, features, order_targets(scenes, n_units, group), named, remarks, said)


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


@dataclass(frozen=True)
class Hints:
    """What is asked half-way up besides the questions."""

    order: OrderHeads
    remark: RemarkHeads
    words: tuple[torch.Tensor, ...]
    """Token ids of REMARK_WORDS."""
    said_words: torch.Tensor
    """Token ids of SAID_WORDS."""


def language_step(model: Model, hints: Hints, lesson: Lesson, phase: Phase) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss on the answers, and with the phase's weights on the hints."""
    batch = lesson.batch
    want = batch.labels[:, 1:]
    want = want[want != IGNORED]
    hidden = hidden_states(model, lesson.features, batch)
    logits = answer_logits(model, hidden[-1], batch)
    each = F.cross_entropy(logits, want, reduction="none")
    loss = (each * batch.answer_weights(type_weights(phase.focus))).mean()
    seen = {"answers": each.mean().item(), "tokens": float((logits.argmax(-1) == want).float().mean())}
    order, remark = phase.hints
    if lesson.order is not None and lesson.named is not None and order:
        asked = hints.order(hidden[DEPTH][:, batch.visual], lesson.order)
        named = hints.order(hidden[NAMED_DEPTH], lesson.named)
        loss, seen["order"], seen["named"] = loss + order * (asked + named), asked.item(), named.item()
    if lesson.remarks is not None and lesson.said is not None and remark:
        embeddings = model.get_input_embeddings().weight
        asked = hints.remark(hidden[REMARK_DEPTH], lesson.remarks, tuple(embeddings[ids] for ids in hints.words))
        said = said_loss(hidden[NAMED_DEPTH], lesson.said, embeddings[hints.said_words])
        loss, seen["remark"], seen["said"] = loss + remark * (asked + said), asked.item(), said.item()
    return loss, seen
