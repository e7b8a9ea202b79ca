"""Dense attention over every token: the baseline that every ratio is taken against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmbench.method import Citation, Method, Traits


@dataclass(frozen=True)
class Full(Method):
    """Changes nothing. Its speed is that of the attention implementation the run asked for."""

    name: ClassVar[str] = "full"
    cite: ClassVar[Citation] = Citation("Attention Is All You Need", "1706.03762", faithful="dense causal attention")
    traits: ClassVar[Traits] = Traits(prefix_reusable=True)

    @classmethod
    def neutral(cls) -> Full:
        return cls()
