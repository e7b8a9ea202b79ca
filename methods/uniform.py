"""Keep visual tokens at equal distances and drop the rest before layer 0: the trivial rival of every token method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmbench.budget import budget, check_budget, keep_visual
from vlmbench.method import Citation, Method, Traits

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Uniform(Method):
    """`ratio` of the visual tokens, or exactly `tokens` of them. Positions of the kept ones do not change."""

    name: ClassVar[str] = "uniform"
    cite: ClassVar[Citation] = Citation("evenly spaced token subset", extension="the whole method")
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prompt"}), prefix_reusable=True)

    ratio: float = 0.25
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_budget(self.name, self.ratio, self.tokens)

    @classmethod
    def examples(cls) -> list[Uniform]:
        return [cls(ratio=0.5), cls(tokens=3)]

    @classmethod
    def neutral(cls) -> Uniform:
        return cls(ratio=1.0)

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        visual = prompt.layout.indices("video", "image")
        n = budget(len(visual), self.ratio, self.tokens)
        # Middle of n equal segments: no end of the video is favoured.
        chosen = [int((i + 0.5) * len(visual) / n) for i in range(n)]
        return keep_visual(prompt, visual[chosen], trace)
