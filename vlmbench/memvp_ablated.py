"""MemVP without one of its parts: other keys and values, frames in another order, another picture or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from vlmbench.memvp_learner import MemoryLearner
from vlmbench.memvp_memory import MemoryShape, Slots, VisualMemory, lay_out
from vlmbench.memvp_prompt import units_of

if TYPE_CHECKING:
    from vlmbench.memvp_data import Material, Question
    from vlmbench.models.base import ModelAdapter

Entries = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of what is seen, p^k and p^v: the keys and values."""

AS_PUBLISHED = "as published"
ENTRIES: dict[str, Entries] = {
    AS_PUBLISHED: lambda seen, own_k, own_v: (seen + own_k, seen + own_v),
    "seen in keys only": lambda seen, own_k, own_v: (seen + own_k, own_v),
    "seen in values only": lambda seen, own_k, own_v: (own_k, seen + own_v),
    "no positions": lambda seen, own_k, own_v: (seen, seen),
}


class Ablated(VisualMemory):
    """With other keys and values."""

    def __init__(self, shape: MemoryShape, *, scale: float, weight: float, form: Entries) -> None:
        super().__init__(shape, scale=scale, weight=weight)
        self._form = form

    def entries(self, seen: Tensor, own_k: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor]:
        return self._form(seen, own_k, own_v)


class Reordered(MemoryLearner):
    """Reads the frames of a video in the order that `order` gives for their number."""

    def __init__(
        self, adapter: ModelAdapter, material: Material, memory: VisualMemory, order: Callable[[int], Tensor]
    ) -> None:
        super().__init__(adapter, material, memory)
        self._order = order

    def slots_of(self, question: Question) -> Slots:
        prompt, shape = self.material.whole(self.adapter, question), self.memory.shape
        units = units_of(prompt)
        turned = [units[i] for i in self._order(len(units)).tolist()]
        return lay_out(turned, shape.slots, shape.units, prompt.embeds)


class Unseen(MemoryLearner):
    """Reads the picture of the next question's, or none."""

    def __init__(self, adapter: ModelAdapter, material: Material, memory: VisualMemory, *, other: bool) -> None:
        super().__init__(adapter, material, memory)
        self._other = other

    def slots_of(self, question: Question) -> Slots:
        if self._other:
            return super().slots_of(question._replace(media=(question.media + 1) % len(self.material.pictures)))
        shape = self.memory.shape
        return lay_out([], shape.slots, shape.units, self.material.whole(self.adapter, question).embeds)
