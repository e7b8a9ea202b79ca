"""Block-Attention: blocks that see nothing but themselves, and a query that sees all (arXiv 2409.15355).

The plainest parallel encoding. The first block starts with the text before the video; each block is encoded as from
position zero and its keys are turned to their final place, which under rotary positions is encoding it in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmbench.method import Citation, Traits
from vlmbench.parallel import ParallelEncoding, check_units

if TYPE_CHECKING:
    from vlmbench.kernels.block_attention import Plan
    from vlmbench.layout import Prompt
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Block(ParallelEncoding):
    """`block` temporal units a block; a last, smaller block takes what is left over."""

    name: ClassVar[str] = "block"
    cite: ClassVar[Citation] = Citation(
        "Block-Attention for Efficient Prefilling",
        "2409.15355",
        faithful="independent blocks, final positions, a last block that sees all",
        extension="frames instead of passages; used without the fine-tuning it was designed for",
    )
    traits: ClassVar[Traits] = Traits(
        stages=frozenset({"prefill"}), takes=frozenset({"attention"}), prefix_reusable=True
    )

    block: int = 8

    def __post_init__(self) -> None:
        check_units(self.name, block=self.block)

    @classmethod
    def examples(cls) -> list[Block]:
        return [cls(block=1), cls(block=2)]

    @classmethod
    def neutral(cls) -> Block:
        return cls(block=10**6)

    def plan(self, prompt: Prompt, trace: Trace) -> Plan | None:
        from vlmbench.kernels.block_attention import make_plan

        (_, stop), *rest = prompt.layout.units
        units = [(0, stop), *rest]
        plan = make_plan(units, prompt.length, sink=0, block=self.block, remainder="last")
        if plan is not None and len(plan.blocks) == 1:
            trace.inactive("one block: equals full attention")
        return plan
