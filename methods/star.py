"""Star Attention: every block behind an anchor, the prompt's first block, and a query that sees all (arXiv 2411.17116).

The original sends one block to each host and encodes the anchor again in front of it; the anchor's keys are the same each
time, since it only sees itself, so here they are computed once. With an anchor of text and frames this is close to PEVLM.
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
class Star(ParallelEncoding):
    """`block` temporal units a block, by default a quarter of the video as in the public runs; the anchor is the first."""

    name: ClassVar[str] = "star"
    cite: ClassVar[Citation] = Citation(
        "Star Attention: Efficient LLM Inference over Long Sequences",
        "2411.17116",
        faithful="anchor block, original positions of anchor and blocks, a query that sees all",
        extension="blocks end with frames; one host, so the anchor is encoded once and not in front of every block",
    )
    traits: ClassVar[Traits] = Traits(
        stages=frozenset({"prefill"}), takes=frozenset({"attention"}), prefix_reusable=True
    )

    block: int | None = None

    def __post_init__(self) -> None:
        check_units(self.name, block=self.block)

    @classmethod
    def examples(cls) -> list[Star]:
        return [cls(block=1)]

    @classmethod
    def neutral(cls) -> Star:
        return cls(block=10**6)

    def plan(self, prompt: Prompt, trace: Trace) -> Plan | None:
        from vlmbench.kernels.block_attention import Plan, make_plan

        units = prompt.layout.units
        block = -(-len(units) // 4) if self.block is None else self.block
        plan = make_plan(units, prompt.length, sink=block, block=block, remainder="last")
        if plan is None:  # the anchor is the whole video
            plan = Plan(units[-1].stop, (), prompt.length)
        if len(plan.blocks) <= 1:
            trace.inactive("the anchor and one block are the whole video: equals full attention")
        return plan
