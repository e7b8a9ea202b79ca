"""One model, one method, one shape: the two sides of a stage, their race, and what lies outside the layers.

Which stage, and what it costs, is `bench_model`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmbench.bench_row import add_note, prepared
from vlmbench.cache import new_cache
from vlmbench.contest import Make, contest, mark_eager, recorded
from vlmbench.dense import RANKED, Flex, backends, label, only, ranked
from vlmbench.madeup import Shape, after_clip, embedded, frames_per_unit
from vlmbench.patch import Patcher
from vlmbench.rounds import Clock, Side, peak_bytes, release
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.method import Method
    from vlmbench.models.base import ModelAdapter

REST_REPEATS = 3


@dataclass(frozen=True)
class Sides:
    """One model, one method, one shape: the two sides of each operation, and their race."""

    adapter: ModelAdapter
    method: Method
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    rounds: int
    steps: int
    seed: int
    graphs: bool
    """Decoding and vision are recorded and replayed."""
    alone: bool
    """Dense attention stays out of the race."""

    def dense_sides(self, call: Any, ready: Any, tokens: int, *, prefill: bool = False) -> dict[str, Side]:
        """`call` under every dense kernel that torch has here for one query, or with `prefill` for all of them.

        `tokens` bounds the kernel that writes its scores down; where a prefill of them takes minutes, the fastest is found
        out on one layer's attention, and they come in that order.
        """
        if self.alone:
            return {}
        score_bytes = self.shape.heads * tokens**2 * 4
        sides = {label(each): Side(label(each), call, ready, only(each)) for each in backends(self.device, score_bytes)}
        if prefill and self.device.type == "cuda":
            sides["flex"] = Side("flex", call, ready, partial(self._flex, Flex()))
        if prefill and self.ranks_apart:
            return {name: sides[name] for name in self._ranked() if name in sides}
        return sides

    @property
    def ranks_apart(self) -> bool:
        """Whether the prompt is so long that the dense kernels of its prefill are ranked on one layer's attention."""
        return self.shape.tokens > RANKED

    def _ranked(self) -> list[str]:
        """The kernels that run, the fastest for one layer's heads at `RANKED` tokens first."""
        q, k, v = (
            torch.randn(1, heads, RANKED, self.shape.head_dim, device=self.device, dtype=self.dtype)
            for heads in (self.shape.heads, self.shape.kv_heads, self.shape.kv_heads)
        )
        return [side.name for side in ranked(q, k, v, Clock(self.device))[0]]

    @contextmanager
    def _flex(self, flex: Flex) -> Iterator[None]:
        with Patcher(self.adapter) as patch:
            patch.attention(flex.as_model_attention)
            yield

    def own_side(self, call: Any, ready: Any) -> Side:
        return Side("method", call, ready, lambda: self.method.attach(self.adapter))

    def race(
        self,
        row: dict[str, Any],
        dense: dict[str, Side],
        own: Side,
        inputs: tuple[list[Tensor], list[Tensor]] = ([], []),
        make: Make | None = None,
        *,
        brief: Make | None = None,
        in_order: bool = False,
    ) -> tuple[Side | None, Side]:
        """The fastest dense side, and the method's own as it ran against it; peaks are those of unrecorded calls.

        `brief` and `in_order` are `contest`'s.
        """
        clock, own_kernel = Clock(self.device), self._replaces_attention()
        best, own = contest(
            row, dense, own, self.rounds, clock, make, own_kernel=own_kernel, brief=brief, in_order=in_order
        )
        release()
        weights = [*self.adapter.model.parameters(), *self.adapter.model.buffers()]
        for side, key, seconds, mine, theirs in (
            (own, "peak_bytes", row["method_s"], inputs[1], inputs[0]),
            (best, "dense_peak_bytes", row["dense_s"], inputs[0], inputs[1]),
        ):
            if side is not None and seconds is not None:
                besides = sum(each.nbytes for each in theirs if all(each is not one for one in mine))
                row[key] = peak_bytes(side, [*weights, *mine], self.device, besides)
        return best, own

    def recording(self, row: dict[str, Any]) -> bool:
        if not self.graphs:
            mark_eager(row)
        return self.graphs

    def _replaces_attention(self) -> bool:
        """A method that leaves attention alone runs under the best dense kernel too."""
        before = self.adapter.text.config._attn_implementation
        with self.method.attach(self.adapter):
            return bool(self.adapter.text.config._attn_implementation != before)

    # -- prompts and what is outside the layers -----------------------------------------------------------------------------

    def prompts(self) -> tuple[tuple[Prompt, Prompt], Trace]:
        """The made-up prompt, and the one made of the frames that the method leaves."""
        trace = Trace(sample_id="bench")
        less = after_clip(self.method, self.shape, frames_per_unit(self.adapter), trace)
        prompt = embedded(self.adapter, self.shape, self.seed)
        return (prompt, prompt if less == self.shape else embedded(self.adapter, less, self.seed)), trace

    def prepared(self, row: dict[str, Any], prompt: Prompt, trace: Trace) -> Prompt:
        """The prompt as the method leaves it, its time in `index_s`."""
        left, row["index_s"] = prepared(self.method, prompt, trace, Clock(self.device))
        if not trace.applied:
            add_note(row, f"nothing to do: {trace.reason}")
        return left

    def rest(self, side: Side, make: Make | None = None) -> float:
        """Seconds of the same call without any layer: what the method plans, embedding, masks, norm and head."""

        @contextmanager
        def around() -> Iterator[Any]:
            with side.around() as entered, without_layers(self.adapter):  # attached while the layers are there
                yield entered

        rest, clock = recorded(replace(side, around=around), make), Clock(self.device)
        rest.seconds(clock)
        return median(rest.seconds(clock) for _ in range(REST_REPEATS))

    def add_whole(self, row: dict[str, Any], dense_rest: float, own_rest: float) -> None:
        """Layers are alike: the whole model takes the rest once and the layers' time as often as it has layers."""
        times = row["model_layers"] / row["layers"]
        for key, rest in (("dense", dense_rest), ("method", own_rest)):
            if (seconds := row[f"{key}_s"]) is not None:
                row[f"whole_{key}_s"] = rest + max(0.0, seconds - rest) * times


@contextmanager
def without_layers(adapter: ModelAdapter) -> Iterator[None]:
    """The language model with its layers taken out; caches keep their number of layers."""
    text, layers = adapter.text, adapter.text.layers
    text.layers = nn.ModuleList()
    adapter.new_cache = partial(new_cache, len(layers))  # type: ignore[method-assign]
    try:
        yield
    finally:
        text.layers = layers
        del adapter.new_cache
