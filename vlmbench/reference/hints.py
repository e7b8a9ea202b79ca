"""Hints of the language stages: what tokens of the clip and of its captions should have found out half-way up the model."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlmbench.reference.build import HIDDEN, TOKENS_PER_UNIT
from vlmbench.reference.prompts import IGNORED, Prefix
from vlmbench.reference.vision import QUADRANT
from vlmbench.suites._synth.captions import ANIMAL_WORD, ANIMALS, EVERY, NUMBER_WORD, WORDS, make_remarks
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, Scene


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
    for b, scene in enumerate(scenes):
        before = (len(COLOURS), len(SHAPES))
        for number, event in enumerate(scene.events):
            tokens = torch.eq(QUADRANT, PLACES.index(event.place)).nonzero().flatten()
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
