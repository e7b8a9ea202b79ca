"""Full attention with its FFN matrices on the host: what a model that does not fit the device costs (a baseline).

CoreMatching's large speed-ups are those of a card too small for the dense model, whose weights cross the bus for every token.
This is that dense model: ``prefetch=on``, the fair rival, copies the next layer's matrices while one computes; ``off`` waits
for each. ``corematching:offload=on`` is held against it at equal memory of the device: where `beta` of every layer's neurons
stay there, this model may keep `beta` of its layers (``resident=13`` of 32 at 0.4), which then cross no bus. Answers are full
attention's, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Offload(Method):
    """The first `resident` layers keep their FFN on the device, those behind run from copies, prefetched or not.

    On a CPU there is no bus: copies are made in memory, and their time says nothing of a card's.
    """

    name: ClassVar[str] = "offload"
    cite: ClassVar[Citation] = Citation("dense weight offloading", extension="the whole method")
    traits: ClassVar[Traits] = Traits(
        exact=True, prefix_reusable=True, stages=frozenset({"prefill", "decode"}), takes=frozenset({"weights"})
    )

    prefetch: bool = True
    resident: int = 0

    def __post_init__(self) -> None:
        if self.resident < 0:
            raise UsageError(f"offload:resident must be at least 0, not {self.resident}.")

    @classmethod
    def neutral(cls) -> Offload:
        return cls()

    def check(self, adapter: ModelAdapter) -> None:
        from vlmbench.offload import check_resident

        check_resident(self.name, self.resident, adapter)

    def install(self, patch: Patcher, trace: Trace) -> None:
        from vlmbench.offload import stream

        layers = range(self.resident, len(patch.adapter.layers))
        stream(patch, trace, layers, prefetch=self.prefetch, again=True)
