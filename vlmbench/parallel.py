"""What methods that encode frames in parallel share: a plan in `prepare`, block attention in prefill, its work."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlmbench.errors import UsageError
from vlmbench.method import Method, Work, one_token

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmbench.kernels.block_attention import Plan
    from vlmbench.layout import Prompt
    from vlmbench.models.base import Shapes
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


class ParallelEncoding(Method):
    """Subclasses say which tokens form sink, blocks and tail (`plan`), and may change positions (`place`)."""

    @property
    def plain(self) -> bool:
        """Whether attention is softmax over what the plan allows, and nothing else; then `bench --check` can judge it."""
        return True

    @abstractmethod
    def plan(self, prompt: Prompt, trace: Trace) -> Plan | None:
        """The plan of a prompt with frames; None, after ``trace.inactive``, when nothing can be split."""

    def place(self, prompt: Prompt, plan: Plan) -> Prompt:
        """Other positions for the tokens; by default each keeps the one it has under full attention."""
        return prompt

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        from vlmbench.kernels.block_attention import is_fast

        if not prompt.layout.units:
            trace.inactive("the prompt has no frames")
            return prompt
        plan = self.plan(prompt, trace)
        if plan is None:
            return prompt
        trace.facts["masked"] = not is_fast(prompt.embeds.device)
        trace.facts["plan"] = {"sink": plan.sink, "blocks": [list(edges) for edges in plan.blocks]}
        return replace(self.place(prompt, plan), extras={**prompt.extras, "block_plan": plan})

    def install(self, patch: Patcher, trace: Trace) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from vlmbench.kernels.block_attention import attend

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
            if block_plan is None:  # decode, or nothing to split
                return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
            require_empty_cache(q, k, block_plan)
            out, masked = attend(q, k, v, block_plan, scale=scaling)
            if masked:  # in any layer
                trace.facts["masked"] = True
            return out.transpose(1, 2).contiguous(), None

        patch.attention(attention)

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        dense = super().work(prompt, shapes, trace)
        plan = prompt.extras.get("block_plan")
        if plan is None:
            return dense
        if trace.facts.get("masked"):  # every pair is computed, those above the diagonal too
            return replace(dense, pairs=(prompt.length**2,) * shapes.layers)
        return replace(dense, pairs=(plan.pairs,) * shapes.layers)

    def decode_work(self, prompt: Prompt, shapes: Shapes, trace: Trace, step: int, size: int) -> Work:
        """Every key is read, also where some are weighed differently."""
        return one_token(prompt.length + step + 1, shapes)


def require_empty_cache(q: Tensor, k: Tensor, plan: Plan) -> None:
    """Raise `ValueError` when there are keys from before the prompt: the plan says of none whether it is seen."""
    if k.shape[2] != plan.length:
        raise ValueError(f"the cache must be empty; it holds {k.shape[2] - q.shape[2]} tokens before the prompt")


def check_units(name: str, **values: int | None) -> None:
    """Refuse block sizes below 1 and sinks below 0."""
    for key, value in values.items():
        least = 0 if key == "sink" else 1
        if value is not None and value < least:
            raise UsageError(f"{name}:{key} must be at least {least}, not {value}.")


def reuse_positions(positions: Tensor, plan: Plan) -> Tensor:
    """Shift every block so that it begins where the first one does, on each axis that M-RoPE has.

    Inside one video that moves the temporal axis alone; text between videos advances all three.
    """
    positions = positions.clone()
    for axis in positions.reshape(-1, positions.shape[-1]):
        begin, end = plan.blocks[0]
        first = int(axis[begin:end].min())
        for start, stop in plan.blocks:
            axis[start:stop] -= int(axis[start:stop].min()) - first
    return positions
