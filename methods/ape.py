"""Adaptive Parallel Encoding: blocks at the same positions behind a shared prefix, reweighed by the query (arXiv 2502.05431).

Every block starts at the position behind the prefix, and the query at the position behind the longest block. When the query
or a generated token looks back, the blocks' scores are divided by a temperature and their log-sum-exp is scaled, before
they are joined with the prefix and the query itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Traits
from vlmbench.parallel import ParallelEncoding, check_units, require_empty_cache, reuse_positions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmbench.kernels.block_attention import Plan
    from vlmbench.layout import Prompt
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Ape(ParallelEncoding):
    """`block` temporal units a block; a last, smaller block takes what is left over. The prefix is the text before it."""

    name: ClassVar[str] = "ape"
    cite: ClassVar[Citation] = Citation(
        "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding",
        "2502.05431",
        faithful="shared prefix, reused positions, query behind the longest block, temperature and scale",
        extension="frames instead of documents; on M-RoPE blocks share the temporal axis",
    )
    traits: ClassVar[Traits] = Traits(
        stages=frozenset({"prefill", "decode"}), takes=frozenset({"attention", "cache"}), prefix_reusable=True
    )

    block: int = 8
    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        check_units(self.name, block=self.block)
        for key in ("temperature", "scale"):
            if not 0 < getattr(self, key) <= 10:
                raise UsageError(f"ape:{key} must be above 0 and at most 10, not {getattr(self, key)}.")

    @classmethod
    def examples(cls) -> list[Ape]:
        return [cls(block=1), cls(block=1, temperature=1.0, scale=1.0)]

    @classmethod
    def neutral(cls) -> Ape:
        return cls(block=10**6, temperature=1.0, scale=1.0)

    @property
    def plain(self) -> bool:
        return self.temperature == self.scale == 1

    def plan(self, prompt: Prompt, trace: Trace) -> Plan | None:
        from vlmbench.kernels.block_attention import make_plan

        plan = make_plan(prompt.layout.units, prompt.length, sink=0, block=self.block, remainder="last")
        if plan is not None and len(plan.blocks) == 1 and self.plain:
            trace.inactive("one block, temperature and scale 1: equals full attention")
        return plan

    def place(self, prompt: Prompt, plan: Plan) -> Prompt:
        positions = reuse_positions(prompt.positions, plan)
        # By as much as the longest context became shorter, the query moves up.
        back = int(prompt.positions[..., : plan.tail].max()) - int(positions[..., : plan.tail].max())
        positions[..., plan.tail :] -= back
        return replace(prompt, positions=positions, next_position=prompt.next_position - back)

    def install(self, patch: Patcher, trace: Trace) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from vlmbench.kernels.block_attention.adaptive import adaptive_attention
        from vlmbench.kernels.block_attention.blocks import before_tail

        of_sample: dict[str, Plan | None] = {"plan": None}

        def attention(
            module: nn.Module,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None,
            *,
            block_plan: Plan | None = None,
            scaling: float | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            if "vlmbench_layout" in kwargs:  # prefill: a new sample
                of_sample["plan"] = block_plan
            plan = of_sample["plan"]
            if plan is None:
                return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
            scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
            weigh = {"temperature": self.temperature, "scale": self.scale, "scaling": scaling}
            context = (plan.sink, plan.tail)
            if block_plan is None:
                out = adaptive_attention(q, k, v, context, **weigh)
            else:
                require_empty_cache(q, k, block_plan)
                out = before_tail(q, k, v, plan, scale=scaling)
                out[:, :, plan.tail :] = adaptive_attention(q[:, :, plan.tail :], k, v, context, **weigh)
            return out.transpose(1, 2).contiguous(), None

        patch.attention(attention)
