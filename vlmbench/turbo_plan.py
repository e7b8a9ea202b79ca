"""What Turbo merges where, in numbers known before anything runs: groups, tokens per block, FLOPs. No tensors.

A tower's tokens come in units that stay together (a Qwen tower: the 2×2 patches that its merger joins), units in groups
within which they may merge (a frame, or a window of one). Numbers of tokens come from the grid alone, never from the data, so
that every shape is fixed and a CUDA graph of the tower holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from vlmbench.kernels.token_merge.schedule import N_REF, cap, weight

Score = Literal["both", "redundancy", "value"]
HEAVIEST = 1e30
"""Of weights: times an importance still a finite float32, and so large that attention alone decides."""


@dataclass(frozen=True)
class Rule:
    """What a method asks of the tower."""

    schedule: tuple[int, ...]
    """Tokens of one picture or frame to merge in each block."""
    alpha: float
    c: float
    beta: float
    gamma: float
    min_tokens: int
    score: Score
    proportional: bool
    normalise: bool
    """Attention is counted in multiples of the mean, and c for towers of `N_REF` tokens."""
    shared: bool
    """The frames of a video merge alike."""
    once: bool
    """All of the schedule's sum in the last block that counts, by repeated passes (FOLDER)."""

    @property
    def values(self) -> bool:
        """Whether a token's importance plays a part."""
        return self.score == "value" or (self.score == "both" and self.alpha * self.c != 0)

    def weight(self, block: int) -> float:
        """What a token's importance counts against cosine similarity in this block."""
        if not self.values:
            return 0.0
        found = weight(self.alpha, self.c, block, beta=self.beta, gamma=self.gamma)
        return found / N_REF if self.normalise else found

    def overflows(self) -> int | None:
        """The first block whose weight is above `HEAVIEST`, if any."""
        for block in range(len(self.schedule)):
            try:
                if self.weight(block) > HEAVIEST:
                    return block
            except OverflowError:  # the power alone
                return block
        return None


class Medium(NamedTuple):
    """A video, or a picture, or one of the crops of a picture."""

    frames: int
    groups: tuple[int, ...]
    """Units in every group of one frame, in the order in which the tower holds them."""

    @property
    def units(self) -> int:
        """In one frame."""
        return sum(self.groups)


class Step(NamedTuple):
    """What one block does to the groups of one frame."""

    before: tuple[int, ...]
    """Units in every group."""
    merged: tuple[int, ...]

    @property
    def after(self) -> tuple[int, ...]:
        return tuple(n - r for n, r in zip(self.before, self.merged, strict=True))


class Clipped(NamedTuple):
    """A block that was asked for more than it can merge."""

    block: int
    asked: int
    merged: int


class Widths(NamedTuple):
    """Sizes of a tower's block that FLOPs follow from."""

    hidden: int
    head_dim: int
    attention: int
    """Weights of the four projections."""
    mlp: int
    """Weights of the MLP."""
    exit: int = 0
    """Weights that each unit left meets behind the blocks (Qwen's merger); 0 where every token is handed out before."""


@dataclass(frozen=True)
class Plan:
    """One pass of a tower over some media."""

    rule: Rule
    media: tuple[Medium, ...]
    unit: int
    """Tokens in a unit."""
    protected: int
    """1 with a class token, else 0."""
    blocks: int
    used: int
    """The last block whose output anything reads."""
    whole_frames: frozenset[int]
    """Blocks that attend over a frame; the others attend inside a group."""

    def check(self) -> None:
        """Raise `ValueError` when not one token of a picture would be left."""
        for medium in self.media:
            asked, there = self._asked(self.used), medium.units * self.unit
            if self.rule.once and asked >= there:
                raise ValueError(
                    f"turbo with where=last would merge {asked} tokens of the {there} of a picture; lower r"
                )

    @cached_property
    def _steps(self) -> tuple[list[list[Step]], list[Clipped]]:
        found: list[list[Step]] = []
        clipped: dict[int, tuple[int, int]] = {}
        for medium in self.media:
            groups, asked_before = medium.groups, [0] * len(medium.groups)
            tokens, cumulative, row = medium.units * self.unit, 0, []
            for block in range(self.blocks):
                cumulative += self._asked(block)
                # Spread over groups in proportion to their size; what does not make a whole unit waits for a later block.
                asked = [cumulative * n // tokens for n in medium.groups]
                wanted = [now - before for now, before in zip(asked, asked_before, strict=True)]
                asked_before = asked
                if not self.rule.once and sum(groups) * self.unit < self.rule.min_tokens:
                    wanted = [0] * len(groups)
                most = [n - 1 - self.protected if self.rule.once else cap(n, self.protected) for n in groups]
                merged = tuple(min(r, limit) for r, limit in zip(wanted, most, strict=True))
                if sum(merged) < sum(wanted):
                    clipped.setdefault(block, (sum(wanted) * self.unit, sum(merged) * self.unit))
                row.append(Step(groups, merged))
                groups = row[-1].after
            found.append(row)
        return found, [Clipped(block, *numbers) for block, numbers in sorted(clipped.items())]

    def _asked(self, block: int) -> int:
        if self.rule.once:
            return sum(self.rule.schedule) if block == self.used else 0
        return self.rule.schedule[block] if block <= self.used else 0

    def step(self, medium: int, block: int) -> Step:
        return self._steps[0][medium][block]

    @property
    def clipped(self) -> list[Clipped]:
        """Blocks that merge less than was asked for, with the tokens of one picture or frame."""
        return self._steps[1]

    def merges(self, block: int) -> bool:
        return any(any(row[block].merged) for row in self._steps[0])

    @property
    def acts(self) -> bool:
        return any(self.merges(block) for block in range(self.used + 1))

    def kept(self, medium: int) -> tuple[int, int]:
        """(units left, units before) of one frame."""
        return sum(self.step(medium, self.used).after), self.media[medium].units

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that the MLP of every block sees, of all media."""
        # Behind the last used block nothing is merged: towers that go on there do so on all tokens.
        return tuple(
            sum(m.frames * sum(self._after(i, block)) for i, m in enumerate(self.media)) * self.unit
            for block in range(self.blocks)
        )

    def _after(self, medium: int, block: int) -> tuple[int, ...]:
        return self.media[medium].groups if block > self.used else self.step(medium, block).after

    def flops(self, widths: Widths, *, dense: bool = False) -> int:
        """Matrix products, multiply-add = 2: projections, attention, MLP, a Qwen's merger, and the matching itself.

        Read off the steps, so that a test can hold it against what torch counts.
        """
        total = 0
        for i, medium in enumerate(self.media):
            for block in range(self.blocks):
                whole = dense or block > self.used
                step = Step(medium.groups, (0,) * len(medium.groups)) if whole else self.step(i, block)
                rows, left = sum(step.before) * self.unit, sum(step.after) * self.unit
                chunks = [sum(step.before)] if block in self.whole_frames else step.before
                pairs = sum((n * self.unit) ** 2 for n in chunks)
                total += medium.frames * (2 * rows * widths.attention + 2 * left * widths.mlp)
                total += medium.frames * 4 * pairs * widths.hidden
                if not whole:
                    total += medium.frames * self._matching_flops(step, widths)
                    if self.protected and self.rule.values and any(step.merged):
                        total += medium.frames * 2 * rows * widths.hidden  # the class token's row once more
            left = medium.units if dense else sum(self.step(i, self.used).after)
            total += medium.frames * 2 * left * widths.exit
        return total

    def _matching_flops(self, step: Step, widths: Widths) -> int:
        """Similarities, and the products that merge features and masses; of repeated passes also metric and importance."""
        width = self.unit * widths.hidden + 1
        if self.rule.once:
            width += widths.head_dim + 1 + (2 if self.rule.values else 0)
        total = 0
        for n, remove in zip(step.before, step.merged, strict=True):
            while remove and (r := min(remove, cap(n, self.protected))):
                total += 2 * (n - n // 2) * (n // 2) * widths.head_dim + 2 * (n // 2) * r * width
                n, remove = n - r, remove - r
        return total
