"""PEVLM: frames encoded in parallel blocks that share a sink (arXiv 2506.19651).

The sink is the text before the video and the first `sink` temporal units; each block of `block` units sees the sink and
itself; the tail (left-over units and the question) sees everything. Every token keeps the position it has under full
attention, no key is dropped, nothing is trained, and decoding is dense over the whole cache.

On a device without a fast kernel the same numbers come from a masked dense call, and the row carries the mark ``masked``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmbench.kernels.block_attention import Plan
    from vlmbench.layout import Prompt
    from vlmbench.models.base import Shapes
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Pevlm(Method):
    """`sink` and `block` count temporal units (Qwen-VL: pairs of frames); `sink` is min(8, a tenth of the video) by default.

    ``positions=reused`` gives every block the positions of the first (the ablation that the paper argues against); on
    M-RoPE only the temporal axis is reused.
    """

    name: ClassVar[str] = "pevlm"
    cite: ClassVar[Citation] = Citation(
        "PEVLM: Parallel Encoding for Vision-Language Models",
        "2506.19651",
        faithful="visibility rule, shared sink, sequential positions, whole cache kept, tail planner",
        extension="default sink and block (the paper's are not public); units from the layout, never constants",
    )
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prefill"}))

    sink: int | None = None
    block: int = 8
    positions: Literal["sequential", "reused"] = "sequential"
    remainder: Literal["tail", "head"] = "tail"

    def __post_init__(self) -> None:
        if self.sink is not None and self.sink < 0:
            raise UsageError(f"pevlm:sink must be at least 0, not {self.sink}.")
        if self.block < 1:
            raise UsageError(f"pevlm:block must be at least 1, not {self.block}.")

    @classmethod
    def examples(cls) -> list[Pevlm]:
        return [
            cls(sink=0, block=1),
            cls(sink=1, block=1),
            cls(sink=0, block=2, remainder="head"),
            cls(sink=0, block=1, positions="reused"),
        ]

    @classmethod
    def neutral(cls) -> Pevlm:
        return cls(sink=0, block=10**6)  # one block: the mask is causal

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        from vlmbench.kernels.block_attention import is_fast, make_plan

        units = prompt.layout.units
        if not units:
            trace.inactive("the prompt has no frames")
            return prompt
        sink = min(8, max(1, len(units) // 10)) if self.sink is None else self.sink
        plan = make_plan(units, prompt.length, sink=sink, block=self.block, remainder=self.remainder)
        if plan is None:
            trace.inactive(f"the sink of {sink} units holds the whole video of {len(units)}")
            return prompt
        if len(plan.blocks) == 1:
            trace.inactive("one block: equals full attention")
        trace.facts["masked"] = not is_fast(prompt.embeds.device)
        trace.facts["plan"] = {"sink": plan.sink, "blocks": [list(edges) for edges in plan.blocks]}
        if self.positions == "reused":
            prompt = replace(prompt, positions=_reused(prompt.positions, plan))
        return replace(prompt, extras={**prompt.extras, "block_plan": plan})

    def install(self, patch: Patcher, trace: Trace) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from vlmbench.kernels.block_attention import block_attention

        def attend(
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
            if block_plan is None:  # decode, or nothing to split
                return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
            return block_attention(q, k, v, block_plan, scale=scaling).transpose(1, 2).contiguous(), None

        patch.attention(attend)

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        dense = super().work(prompt, shapes, trace)
        plan = prompt.extras.get("block_plan")
        return dense if plan is None else replace(dense, pairs=(plan.pairs,) * shapes.layers)


def _reused(positions: Tensor, plan: Plan) -> Tensor:
    """Shift every block so that it starts where the first one does: the only axis, or the temporal one of three."""
    positions = positions.clone()
    axis = positions[0] if positions.dim() == 2 else positions[0, 0]
    first = int(axis[plan.blocks[0][0]])
    for start, stop in plan.blocks:
        axis[start:stop] -= int(axis[start]) - first
    return positions
