"""Hints of the language stages: what tokens of the clip and of its captions should have found out half-way up the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from vlmbench.reference.build import HIDDEN, TOKENS_PER_UNIT
from vlmbench.reference.prompts import IGNORED, Prefix
from vlmbench.reference.vision import QUADRANT
from vlmbench.suites._synth.captions import ANIMAL_WORD, ANIMALS, EVERY, NUMBER_WORD, WORDS, make_remarks
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, Scene

DEPTH = 3
"""Layers below the hints, so that as many are left to use what was found.

Questions alone take thousands of steps to teach that the token of an event should look up its predecessor across blank
frames, or a number who said it; asked of every such token, it is learned with the first look-ups.
"""
ORDER_SIZES = (len(COLOURS) + 1, len(SHAPES) + 1, 8)
"""Colour and shape of the event before (the last class: there is none), and the number of events up to here."""
REMARK_WORDS = (ANIMALS, COLOURS, SHAPES)
"""Who says this number, and colour and shape of the latest event."""


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
        """hidden: [B, n, C]; targets: int64 [B, n, 3], IGNORED where there is nothing to know.

        words: the embeddings of the words of REMARK_WORDS, [8, C], [8, C] and [4, C].
        """
        there = (targets != IGNORED).any(-1)
        z = self.norm(hidden[there])
        return _mean_loss([z @ F.normalize(each.detach(), dim=-1).T for each in words], targets[there])


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


def remark_targets(scenes: list[Scene], prefix: Prefix, width: int) -> torch.Tensor:
    """int64 [B, width, 3], as in REMARK_WORDS: at the number of every remark, and but for the first also at its animal."""
    found = torch.full((len(scenes), width, 3), IGNORED)
    words = [i for i, token in enumerate(prefix.tokens) if not token]
    for b, scene in enumerate(scenes):
        for remark in make_remarks(scene):
            animal, number = (words[remark.caption * WORDS + place] for place in (ANIMAL_WORD, NUMBER_WORD))
            seen = [event for event in scene.events if event.start < (remark.caption + 1) * EVERY]
            colour = COLOURS.index(seen[-1].colour) if seen else IGNORED
            shape = SHAPES.index(seen[-1].shape) if seen else IGNORED
            found[b, animal] = torch.tensor([IGNORED, colour, shape])
            found[b, number] = torch.tensor([ANIMALS.index(remark.animal), colour, shape])
    return found
