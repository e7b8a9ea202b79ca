"""What a reference model learns, stage by stage: to see first, then to answer, on clips that grow longer.

Trained jointly from the start, the model stays at chance: the language side gets no usable features and the vision side
no usable gradient. So the tower first learns to write words: a token of a red circle in the top left corner is pulled
towards the embeddings of these words, until they can be read off it. Then it is frozen, its features are computed once,
and the language side finds in its first layers what it would find in text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vlmbench.reference.build import LLAVA, QWEN
from vlmbench.reference.data import IMAGE


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
    focus: float = 0.0
    """Weight of the types in LAST; 0: all types count the same."""


LAST = ("before", "which_first", "says", "speaker", "beside")
"""Types of question that are learned last."""
UNGATED = ("motion", "count")
"""Types that are reported and not required."""


def type_weights(focus: float) -> dict[str, float]:
    """How much a question counts by its type where a phase says so; others count 1."""
    return {**dict.fromkeys(LAST, focus), **dict.fromkeys(UNGATED, 0.25)} if focus else {}


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

    match: bool = False
    """Whether it begins with `build.match_words` on the words of captions."""

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
    seed: int = 0


_LLAVA_SPANS = (0, 0, 64, 128, 256, 384)
_QWEN_SPANS = (0, 0, 32, 64, 128, 192)


def _ending(spans: tuple[int, ...], longest: str, matching: int) -> tuple[Stage, ...]:
    """The last stages of both models: look-ups in captions, then all lengths."""
    short = ("8", "12", "4+text", "8+text", "8+text", "8+text", "12+text")
    return (
        Stage("said", 300, 2e-3, (Phase(1, short, 16, spans, (0.2, 1.0), 4.0),), tokens=1500, horizon=1000),
        Stage(
            "match",
            matching,
            2e-3,
            (Phase(1, short, 16, spans, (0.2, 1.0), 4.0),),
            tokens=1500,
            horizon=1000,
            match=True,
        ),
        Stage(
            "length",
            700,
            1.5e-3,
            (
                Phase(
                    0.6,
                    ("8", "12", "16", "16", "32", IMAGE, "8+text", "8+text", "12+text", "16+text"),
                    18,
                    spans,
                    (0.3, 0.6),
                    3.0,
                ),
                Phase(
                    1,
                    ("8", "16", "32", "64", longest, IMAGE, "8+text", "16+text", "32+text", "64+text"),
                    20,
                    spans,
                    (0.2, 0.3),
                    2.0,
                ),
            ),
            tokens=2400,
        ),
        # Lists and places in the longest videos come last, and every type counts the same.
        Stage(
            "settle",
            200,
            6e-4,
            (Phase(1, ("16", "32", "64", "128", "128", IMAGE, "32+text", "64+text"), 24, spans, (0.1, 0.1)),),
        ),
    )


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
                "order",
                600,
                1.5e-3,
                (
                    Phase(0.5, ("6", "8", "12", "16", "4+text", "8+text"), 18, _LLAVA_SPANS, (0.4, 0.2), 2.0),
                    Phase(0.8, ("8", "12", "16", "32", IMAGE, "8+text", "16+text"), 20, _LLAVA_SPANS, (0.2, 0.1), 2.0),
                ),
                horizon=1000,
            ),
            Stage(
                "focus",
                900,
                1.5e-3,
                (Phase(0.5, ("6", "8", "12", "4+text", "8+text", "12+text"), 18, _LLAVA_SPANS, (0.2, 0.1), 3.0),),
                horizon=1800,
            ),
            Stage(
                "long",
                700,
                8e-4,
                (
                    Phase(0.4, ("8", "12", "8+text", "12+text", "16"), 20, _LLAVA_SPANS, (0.2, 0.3), 3.0),
                    Phase(0.7, ("8", "16", "32", IMAGE, "8+text", "16+text"), 20, _LLAVA_SPANS, (0.1, 0.2), 3.0),
                    Phase(
                        1,
                        ("8", "16", "32", "64", "128", IMAGE, "8+text", "16+text", "32+text", "64+text"),
                        20,
                        _LLAVA_SPANS,
                        (0.1, 0.1),
                        2.0,
                    ),
                ),
            ),
            Stage(
                "names",
                600,
                2e-3,
                (
                    Phase(0.4, ("8", "12", "16", "4+text", "8+text", "12+text"), 18, _LLAVA_SPANS, (0.3, 0.3), 3.0),
                    Phase(
                        1, ("8", "16", "32", IMAGE, "8+text", "16+text", "32+text"), 20, _LLAVA_SPANS, (0.2, 0.2), 3.0
                    ),
                ),
                horizon=1200,
            ),
            *_ending(_LLAVA_SPANS, "128", 300),
        ),
    ),
    # The vision side writes the same words, so the language side needs to learn the other positions and little else.
    QWEN: Recipe(
        QWEN,
        (
            Stage("vision", 900, 2e-3, (Phase(1, ("32", "32", IMAGE)),), tokens=1536),
            Stage(
                "language",
                600,
                2e-3,
                (
                    Phase(0.25, ("4", "8", "12", IMAGE, "4+text", "8+text"), 16, (0, 0, 32), (0.3, 0.3), 2.0),
                    Phase(
                        0.6, ("8", "12", "16", IMAGE, "4+text", "8+text", "12+text"), 18, _QWEN_SPANS, (0.3, 0.3), 3.0
                    ),
                ),
                horizon=1200,
            ),
            *_ending(_QWEN_SPANS, "64", 400),
        ),
        start=LLAVA,
    ),
}
