"""PEVLM: frames encoded in parallel blocks that share a sink (arXiv 2506.19651).

The sink is the text before the video and the first `sink` temporal units; each block of `block` units sees the sink and
itself; the tail (left-over units and the question) sees everything. Every token keeps the position it has under full
attention, no key is dropped, nothing is trained, and decoding is dense over the whole cache.

On a device without a fast kernel the same numbers come from a masked dense call, and the row carries the mark ``masked``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmbench.method import Citation, Traits
from vlmbench.parallel import ParallelEncoding, check_units, reuse_positions

if TYPE_CHECKING:
    from vlmbench.kernels.block_attention import Plan
    from vlmbench.layout import Prompt
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Pevlm(ParallelEncoding):
    """`sink` and `block` count temporal units (Qwen-VL: pairs of frames), or tokens with ``unit=token``.

    The default sink is a tenth of the video, from 1 to 8 units. ``positions=reused`` gives every block the positions of the
    first, on M-RoPE along the temporal axis; ``reused-1d`` also flattens M-RoPE's axes into one, as the authors' prototype
    did. Both are the ablation that the paper argues against. Left-over units go to the tail, or (``remainder=head``) form a
    first, smaller block.
    """

    name: ClassVar[str] = "pevlm"
    cite: ClassVar[Citation] = Citation(
        "PEVLM: Parallel Encoding for Vision-Language Models",
        "2506.19651",
        faithful="visibility rule, shared sink, sequential positions, whole cache kept, both planners",
        extension="default sink and block (the paper's are not public); units from the layout, never constants; token "
        "blocks end with the last visual token instead of running into the question",
    )
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prefill"}))

    sink: int | None = None
    block: int = 8
    unit: Literal["frame", "token"] = "frame"
    positions: Literal["sequential", "reused", "reused-1d"] = "sequential"
    remainder: Literal["tail", "head"] = "tail"

    def __post_init__(self) -> None:
        check_units(self.name, sink=self.sink, block=self.block)

    @classmethod
    def examples(cls) -> list[Pevlm]:
        return [
            cls(sink=0, block=1),
            cls(sink=1, block=1),
            cls(sink=0, block=2, remainder="head"),
            cls(sink=5, block=5, unit="token"),
            cls(sink=0, block=1, positions="reused"),
            cls(sink=0, block=1, positions="reused-1d"),
        ]

    @classmethod
    def neutral(cls) -> Pevlm:
        return cls(sink=0, block=10**6)  # one block: causal attention

    def plan(self, prompt: Prompt, trace: Trace) -> Plan | None:
        from vlmbench.kernels.block_attention import make_plan

        units, sink = self._units(prompt)
        plan = make_plan(units, prompt.length, sink=sink, block=self.block, remainder=self.remainder)
        if plan is None:
            trace.inactive(f"the sink holds the whole video of {len(prompt.layout.units)} units")
        elif len(plan.blocks) == 1 and self.positions == "sequential":
            trace.inactive("one block: equals full attention")
        return plan

    def _units(self, prompt: Prompt) -> tuple[Sequence[tuple[int, int]], int]:
        """(what is grouped into blocks, how many of them are the sink)."""
        frames = prompt.layout.units
        if self.unit == "frame":
            return frames, min(8, max(1, len(frames) // 10)) if self.sink is None else self.sink
        # By default the text before the video alone.
        first = frames[0].start if self.sink is None else self.sink
        return [(i, i + 1) for i in range(frames[-1].stop)], first

    def place(self, prompt: Prompt, plan: Plan) -> Prompt:
        if self.positions == "sequential":
            return prompt
        positions = prompt.positions
        if self.positions == "reused-1d" and positions.dim() == 3:
            # All axes count tokens up to the tail, which keeps its own.
            positions = positions.clone()
            positions[..., : plan.tail] = positions.new_tensor(range(plan.tail))
            flat = reuse_positions(positions[0], plan)
            return replace(prompt, positions=flat.expand_as(positions))
        return replace(prompt, positions=reuse_positions(positions, plan))
