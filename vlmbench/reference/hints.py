"""Hints of the language stages: what tokens of the clip and of its captions should have found out half-way up the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from vlmbench.reference.build import HIDDEN, TOKENS_PER_UNIT
from vlmbench.reference.prompts import IGNORED, Batch, Prefix
from vlmbench.reference.vision import QUADRANT
from vlmbench.suites._synth.captions import ANIMAL_WORD, ANIMALS, EVERY, NUMBER_WORD, TEXT_TYPES, WORDS, make_remarks
from vlmbench.suites._synth.questions import NUMBERS, Question
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, Scene

DEPTH = 3
"""Layers below the hints on order, so that as many are left to use what was found.

Questions alone take thousands of steps to teach that the token of an event should look up its predecessor across blank
frames, or a number who said it; asked of every such token, it is learned with the first look-ups.
"""
NAMED_DEPTH = DEPTH + 1
"""Layers below the same hints on the words of a question that name an event: they read them off its tokens."""
REMARK_DEPTH = 2
"""Layers below the hints on remarks, so that the layers that look up shapes find numbers as well."""
ORDER_SIZES = (len(COLOURS) + 1, len(SHAPES) + 1, 8)
"""Colour and shape of the event before (the last class: there is none), and the number of events up to here."""
REMARK_WORDS = (ANIMALS, NUMBERS, COLOURS, SHAPES)
"""Who says this number, the number itself (early layers drop a token's own word), and colour and shape of the latest event."""


SAID_WORDS = (*ANIMALS, *NUMBERS)
"""What a question about captions is answered with."""


class OrderHeads(nn.Module):
    """Linear reads, thrown away afterwards: the word directions of an event's token hold its own colour and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, elementwise_affine=False)
        self.read = nn.Linear(HIDDEN, sum(ORDER_SIZES))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden: [B, n, C]; targets: int64 [B, n, 3], IGNORED where no event is."""
        there = targets[..., 0] != IGNORED
        read = self.read(self.norm(hidden[there])).split(ORDER_SIZES, -1)
        return _mean_loss(read, targets[there])


class RemarkHeads(nn.Module):
    """Reads with the model's own words, so that a question's word finds a number by who said it, as it finds a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, elementwise_affine=False)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, words: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """hidden: [B, n, C]; targets: int64 [B, n, 4], IGNORED where there is nothing to know.

        words: the embeddings of the words of REMARK_WORDS, three times [8, C] and [4, C].
        """
        there = (targets != IGNORED).any(-1)
        z = self.norm(hidden[there])
        return _mean_loss([z @ F.normalize(each.detach(), dim=-1).T for each in words], targets[there])


def said_loss(hidden: torch.Tensor, targets: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Of reading the answer off the word that is asked about, with the model's own words: hidden [B, n, C], targets [B, n]."""
    there = targets != IGNORED
    z = F.rms_norm(hidden[there], hidden.shape[-1:])
    return F.cross_entropy(z @ F.normalize(words.detach(), dim=-1).T, targets[there])


def _mean_loss(read: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    wanted = zip(read, targets.unbind(-1), strict=True)
    return torch.stack([F.cross_entropy(logits, want, ignore_index=IGNORED) for logits, want in wanted]).mean()


def order_targets(scenes: list[Scene], n_units: int, group: int) -> torch.Tensor:
    """int64 [B, units · 16, 3], as in ORDER_SIZES, at the four tokens of an event's quadrant in each unit that shows it."""
    found = torch.full((len(scenes), n_units, TOKENS_PER_UNIT, 3), IGNORED)
    for b, scene in enumerate(scenes):
        before = (len(COLOURS), len(SHAPES))
        for number, event in enumerate(scene.events):
            tokens = torch.eq(QUADRANT, PLACES.index(event.place)).nonzero().flatten()
            for unit in range(event.start // group, (event.stop - 1) // group + 1):
                found[b, unit, tokens] = torch.tensor([*before, number])
            before = COLOURS.index(event.colour), SHAPES.index(event.shape)
    return found.flatten(1, 2)


def named_targets(scenes: list[Scene], batch: Batch, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """int64 [B, L, 3], as in ORDER_SIZES, at the last word of the name of an event wherever a question holds it."""
    found = torch.full((*batch.ids.shape, 3), IGNORED)
    colours, shapes = (torch.tensor(tokenizer.convert_tokens_to_ids(list(words))) for words in (COLOURS, SHAPES))
    asked = (batch.part > 0) & (batch.labels == IGNORED)
    names = asked & torch.isin(batch.ids, shapes) & torch.isin(batch.ids.roll(1, 1), colours)
    for b, scene in enumerate(scenes):
        known: dict[tuple[int, int], torch.Tensor] = {}
        before = (len(COLOURS), len(SHAPES))
        for number, event in enumerate(scene.events):
            look = COLOURS.index(event.colour), SHAPES.index(event.shape)
            known[int(colours[look[0]]), int(shapes[look[1]])] = torch.tensor([*before, number])
            before = look
        for at in names[b].nonzero().flatten().tolist():
            found[b, at] = known[int(batch.ids[b, at - 1]), int(batch.ids[b, at])]
    return found


def said_targets(asked: Sequence[Sequence[Question]], batch: Batch, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """int64 [B, L], the place of the answer in SAID_WORDS, at the word that a question about captions asks about."""
    found = torch.full(batch.ids.shape, IGNORED)
    keys = torch.tensor(tokenizer.convert_tokens_to_ids([*SAID_WORDS, *SHAPES]))
    key = torch.isin(batch.ids, keys) & (batch.labels == IGNORED)
    for b, row in enumerate(asked):
        for k, question in enumerate(row, 1):
            if question.type in TEXT_TYPES:
                at = ((batch.part[b] == k) & key[b]).nonzero().flatten()[-1]
                found[b, at] = SAID_WORDS.index(question.answer)
    return found


def remark_targets(
    scenes: list[Scene], prefix: Prefix, batch: Batch, tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """int64 [B, L, 4], as in REMARK_WORDS, at animal and number of every remark and wherever a question names one."""
    found = torch.full((*batch.ids.shape, len(REMARK_WORDS)), IGNORED)
    words = [i for i, token in enumerate(prefix.tokens) if not token]
    asked = (batch.part > 0) & (batch.labels == IGNORED)
    for column, own in enumerate((ANIMALS, NUMBERS)):
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(own)))
        named = asked & torch.isin(batch.ids, ids)
        found[..., column][named] = torch.eq(batch.ids[named][:, None], ids).int().argmax(-1)
    for b, scene in enumerate(scenes):
        for remark in make_remarks(scene):
            animal, number = (words[remark.caption * WORDS + place] for place in (ANIMAL_WORD, NUMBER_WORD))
            seen = [event for event in scene.events if event.start < (remark.caption + 1) * EVERY]
            colour = COLOURS.index(seen[-1].colour) if seen else IGNORED
            shape = SHAPES.index(seen[-1].shape) if seen else IGNORED
            who = ANIMALS.index(remark.animal)
            found[b, animal] = torch.tensor([who, IGNORED, colour, shape])
            found[b, number] = torch.tensor([who, NUMBERS.index(remark.number), colour, shape])
    return found
