"""No visual tokens at all: what the language model answers from the question alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmbench.method import Citation, Method, Traits

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Blind(Method):
    """Drops frames and separators; the text keeps the positions it has in the whole prompt. No frame is encoded."""

    name: ClassVar[str] = "blind"
    cite: ClassVar[Citation] = Citation("language-only control", extension="the whole method")
    traits: ClassVar[Traits] = Traits(
        sees_vision=False, stages=frozenset({"vision", "prompt"}), takes=frozenset({"visual"})
    )

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        if not prompt.layout.n_visual:
            trace.inactive("the prompt has no visual tokens")
            return prompt
        keep = prompt.layout.indices("text")
        trace.kept["prompt"] = keep.tolist()
        return prompt.select(keep)
