"""Keep a random subset of the visual tokens and drop the rest before layer 0; a surprisingly strong rival."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmbench.budget import budget, check_budget, keep_visual
from vlmbench.method import Citation, Method, Traits

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Random(Method):
    """`ratio` of the visual tokens, or exactly `tokens` of them, drawn anew for each sample and the same on every run."""

    name: ClassVar[str] = "random"
    cite: ClassVar[Citation] = Citation("random token subset", extension="the whole method")
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prompt"}))

    ratio: float = 0.25
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.name, self.ratio, self.tokens)

    @classmethod
    def examples(cls) -> list[Random]:
        return [cls(ratio=0.5), cls(tokens=3)]

    @classmethod
    def neutral(cls) -> Random:
        return cls(ratio=1.0)

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        import torch

        visual = prompt.layout.indices("video", "image")
        n = budget(len(visual), self.ratio, self.tokens)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{trace.sample_id}".encode()))
        chosen = torch.randperm(len(visual), generator=generator)[:n].sort().values
        return keep_visual(prompt, visual[chosen], trace)
