"""PEVLM: frames encoded in parallel blocks that share a sink (arXiv 2506.19651).

The sink is the text before the video and the first `sink` temporal units; each block of `block` units sees the sink and
itself; the tail (left-over units and the question) sees everything. Every token keeps the position it has under full
attention, no key is dropped, nothing is trained, and decoding is dense over the whole cache.

On a device without a fast kernel the same numbers come from a masked dense call, and the row carries the mark ``masked``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmbench.artefact import Artefact, read
from vlmbench.errors import UsageError
from vlmbench.method import Citation, Traits
from vlmbench.parallel import ParallelEncoding, check_units, reuse_positions
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.backend import Identity
    from vlmbench.fitting import Fitting
    from vlmbench.kernels.block_attention import Plan
    from vlmbench.layout import Prompt

BLOCK = 8
SINKS, BLOCKS = (0, 1, 4, 8, 16, 32), (4, 8, 16, 32, 64)
"""What `Pevlm.search` tries: the values of the authors' public scripts, in temporal units, and those around them."""


@dataclass(frozen=True)
class Pevlm(ParallelEncoding):
    """`sink` and `block` count temporal units (Qwen-VL: pairs of frames), or tokens with ``unit=token``.

    The default sink is a tenth of the video, from 1 to 8 units, the default block 8 units; those of a file that
    ``vlmbench fit`` wrote take their place with ``artefact=FILE``. ``positions=reused`` gives every block the positions of the
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
    traits: ClassVar[Traits] = Traits(
        stages=frozenset({"prefill"}), takes=frozenset({"attention"}), prefix_reusable=True
    )

    sink: int | None = None
    block: int | None = None
    unit: Literal["frame", "token"] = "frame"
    positions: Literal["sequential", "reused", "reused-1d"] = "sequential"
    remainder: Literal["tail", "head"] = "tail"
    artefact: str | None = None

    def __post_init__(self) -> None:
        found = self._fitted.parameters if self._fitted is not None else {"block": BLOCK}
        for key in ("unit", "positions", "remainder"):
            if key in found and getattr(self, key) != found[key]:
                raise UsageError(
                    f"pevlm:artefact={self.artefact} was fitted with {key}={found[key]}, not {getattr(self, key)}; give "
                    f"{key}={found[key]} too, or sink and block instead of the artefact."
                )
        for key in ("sink", "block"):  # of these two, what is given wins; the three above were only to agree
            value = found.get(key)
            if self.artefact is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UsageError(f"pevlm:artefact={self.artefact} is damaged ({key} is {value!r}); make it again.")
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        check_units(self.name, sink=self.sink, block=self.block)

    @cached_property
    def _fitted(self) -> Artefact | None:
        return None if self.artefact is None else read(self.artefact, self.name)

    def check_weights(self, identity: Identity) -> None:
        if self._fitted is not None:
            self._fitted.check_weights(str(self.artefact), identity)

    def fitted(self) -> dict[str, Any]:
        return {} if self._fitted is None else {"artefact": self._fitted.digest}

    def search(self, fitting: Fitting) -> Artefact:
        """The (sink, block) of fewest query-key pairs that answers like full attention often enough."""
        if self.unit != "frame":
            raise UsageError(f"pevlm is fitted in frames; leave unit={self.unit} out.")
        prompt = fitting.prompt()
        found: dict[Plan, Pevlm] = {}
        for sink, block in product(SINKS, BLOCKS) if prompt.layout.units else ():
            setting = replace(self, sink=sink, block=block, artefact=None)
            plan = setting.plan(prompt, Trace())
            if plan is not None and len(plan.blocks) > 1:
                found.setdefault(plan, setting)
        dense = prompt.length * (prompt.length + 1) / 2
        ordered = sorted(found, key=lambda plan: plan.pairs)
        return fitting.cheapest([(plan.pairs / dense, found[plan]) for plan in ordered], ("sink", "block"))

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
        plan = make_plan(units, prompt.length, sink=sink, block=self.block or BLOCK, remainder=self.remainder)
        if plan is None:
            trace.inactive(f"the sink of {sink} takes all {len(units)} units, and no block is left")
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
            # All axes count tokens up to the tail, which keeps its own: left-over units there have rows and columns.
            counted = positions.new_tensor(range(plan.tail))
            positions = positions.clone()
            positions[..., : plan.tail] = reuse_positions(counted, plan)
            return replace(prompt, positions=positions)
        return replace(prompt, positions=reuse_positions(positions, plan))
