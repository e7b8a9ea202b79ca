"""Decoding on a card too small for the weights: a method that leaves FFNs on the host, and dense attention that streams them.

Every matrix of the FFNs waits in pinned memory for both sides. Dense attention keeps as many layers on the card as the limit
allows and streams the others for every token, plain or prefetched (the method ``offload``); the method copies all of them once
a prompt and keeps what it decodes with. Each side first runs under the limit, which the allocator enforces; the rounds are then
taken without it, since the card holds what both sides need. Seconds are those of a prompt and its answer, so that what a
prompt copies counts; tokens a second are decoding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from vlmbench import bench_model
from vlmbench.bench_row import add_note, new_row, note_masked, ran_out
from vlmbench.contest import mark_eager
from vlmbench.errors import RunError, UsageError
from vlmbench.graphs import NotRecordedError, recorder
from vlmbench.madeup import Shape, embedded
from vlmbench.patch import Patcher
from vlmbench.recorded import Decoding, Filled, decoding
from vlmbench.rounds import Clock, out_of_memory, release
from vlmbench.small_card import GB, bus_rate, fits, limited, on_card
from vlmbench.stats import ratio_interval
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.method import Method
    from vlmbench.models.base import ModelAdapter

TRIED_STEPS = 4
"""Tokens that each side generates under the limit: a token copies what every other one copies."""
WAYS = {"offload/plain": False, "offload/prefetched": True}
"""Dense sides -> whether the next layer is copied while one computes."""


@dataclass
class _Timed:
    """Rounds of one side, and what it did."""

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    peak: int | None = None
    """Bytes that the allocator had reserved under the limit."""
    copied: dict[str, int] = field(default_factory=dict)
    """``host_bytes prefill_bytes decode_bytes`` of one prompt and the tokens tried."""

    @property
    def whole_s(self) -> list[float]:
        return [a + b for a, b in zip(self.prefill_s, self.decode_s, strict=True)]


@torch.inference_mode()
def rows(
    method: Method,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    memory_gb: float,
    rounds: int,
    steps: int,
    resident: int | None = None,
    graphs: bool | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Dense side -> the row against it, the plain one last. `resident` layers stay on the card, by default all that fit.

    Raises `UsageError` when the method leaves nothing on the host, and `RunError` when not even the dense model does fit of
    which every FFN is streamed; a method that does not fit has rows marked ``oom``.
    """
    bench_model._refuse("decode", method, shape, None, steps)
    made = {name: new_row("decode", method, shape, device, dtype) | {"steps": steps} for name in reversed(WAYS)}
    adapter = bench_model._load(shape, None, device, dtype, seed)
    method.check(adapter)
    for row in made.values():
        row |= {"layers": adapter.shapes.layers, "model_layers": adapter.shapes.layers}
    bench = _Bench(adapter, method, shape, int(memory_gb * GB), steps, seed)
    try:
        with Patcher(adapter) as patch:
            for layer in adapter.layers:
                patch.on_host(layer.mlp)
            release()
            bench.keep(resident)
            found = bench.timed(rounds, device.type == "cuda" if graphs is None else graphs)
        for name, row in made.items():
            bench.close(row, name, found)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        for row in made.values():
            ran_out(row, "a side", error)
    return made


class _Bench:
    """One model whose FFNs are on the host, and the sides that decode with it."""

    def __init__(self, adapter: ModelAdapter, method: Method, shape: Shape, limit: int, steps: int, seed: int) -> None:
        self.adapter, self.method, self.limit, self.steps = adapter, method, limit, steps
        self.prompt = embedded(adapter, shape, seed)
        self.clock = Clock(adapter.device)
        self.resident = 0
        self.roomy = False
        """Whether dense attention needs no offload within the limit."""
        self.bus: float | None = None
        self.trace = Trace()
        self.eager: str | None = ""
        """Why the method was not recorded; None when it was."""

    def keep(self, resident: int | None) -> None:
        """Say how many layers dense attention keeps: those that fit by arithmetic, and one fewer as often as they do not."""
        layers = self.adapter.layers
        most = fits(self.adapter, self.limit, self.prompt.length + self.steps) if resident is None else resident
        self.resident = min(most, len(layers) - 1)
        self.roomy = resident is None and most >= len(layers)
        if self.resident < 0:
            raise RunError(
                f"{self.limit / GB:g} GB do not hold the dense model even with every FFN streamed; give more memory or a "
                f"smaller shape."
            )

    # -- the sides --------------------------------------------------------------------------------------------------------

    @contextmanager
    def dense(self, prefetch: bool) -> Iterator[Trace]:
        from vlmbench.methods.offload import Offload

        stays = [layer.mlp for layer in self.adapter.layers[: self.resident]]
        with (
            on_card(stays, self.adapter.device),
            Offload(prefetch=prefetch, resident=self.resident).attach(self.adapter) as trace,
        ):
            yield trace

    def fill(self, trace: Trace, method: Method | None = None, steps: int | None = None) -> Filled:
        trace.reset("bench")
        prompt: Prompt = method.prepare(self.prompt, trace) if method else self.prompt
        cache = self.adapter.new_cache(self.steps if steps is None else steps)
        return Filled(cache, self.adapter.prefill(prompt, cache).argmax(-1, keepdim=True), prompt.next_position)

    def decode(self, filled: Filled, steps: int) -> None:
        cache, token, position = filled
        for step in range(steps):
            token = self.adapter.decode(token, position + step, cache).argmax(-1, keepdim=True)
            int(token)  # each id reaches the host before the next step, as in a run

    # -- under the limit --------------------------------------------------------------------------------------------------

    def tried(self, prefetch: bool) -> _Timed:
        """A few tokens of a dense side under the limit; a layer less stays on the card where they do not fit."""
        while True:
            try:
                with limited(self.adapter.device, self.limit) as peak, self.dense(prefetch) as trace:
                    self.decode(self.fill(trace), TRIED_STEPS)
                    return _Timed(peak=peak(), copied=dict(trace.facts["offload"]))
            except RuntimeError as error:
                if not out_of_memory(error) or self.resident == 0:
                    raise
                self.resident -= 1
            release()

    def recorded(self, graphs: bool) -> tuple[Decoding | None, _Timed]:
        """The method's decoding recorded under the limit, or where that cannot be a few tokens of it."""
        made: Decoding | None = None
        with limited(self.adapter.device, self.limit) as peak, self.method.attach(self.adapter) as trace:
            filled = self.fill(trace, self.method)
            if "offload" not in trace.facts:
                raise UsageError(
                    f"{self.method.name} leaves nothing on the host; give corematching:offload=on, or leave the limit out."
                )
            if graphs:
                try:
                    made, self.eager = decoding(self.adapter, recorder(self.adapter.device), filled, self.steps), None
                except NotRecordedError as error:
                    self.eager = str(error)
            if made is None:
                self.decode(filled, TRIED_STEPS)
            self.trace = trace
            return made, _Timed(peak=peak(), copied=dict(trace.facts["offload"]))

    # -- the rounds -------------------------------------------------------------------------------------------------------

    def timed(self, rounds: int, graphs: bool) -> dict[str, _Timed]:
        """All sides in turns. What is recorded is read after the method has left: a recording holds what it reads."""
        found: dict[str, _Timed] = {}
        kept = None
        while kept != self.resident:  # both dense sides keep as many layers
            kept = self.resident
            found = {name: self.tried(prefetch) for name, prefetch in WAYS.items()}
            release()
        self.bus = bus_rate(self.adapter.layers[-1].mlp, self.adapter.device, self.clock)
        replays, found["method"] = self.recorded(graphs)
        names = [*found]
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name == "method":
                    self._method(replays, found[name])
                else:
                    with self.dense(WAYS[name]) as trace:
                        self._round(trace, found[name], None)
        return found

    def _round(self, trace: Trace, into: _Timed, method: Method | None, decode: bool = True) -> None:
        filled: list[Filled] = []
        into.prefill_s.append(self.clock(lambda: filled.append(self.fill(trace, method))))
        if decode:
            into.decode_s.append(self.clock(lambda: self.decode(filled[0], self.steps)))

    def _method(self, replays: Decoding | None, into: _Timed) -> None:
        with self.method.attach(self.adapter) as trace:
            self._round(trace, into, self.method, decode=replays is None)
        if replays is not None:
            replays.restart()
            into.decode_s.append(self.clock(replays.run))

    # -- the row ----------------------------------------------------------------------------------------------------------

    def close(self, row: dict[str, Any], name: str, found: dict[str, _Timed]) -> None:
        dense, own = found[name], found["method"]
        row["dense_kernel"] = f"{name}, {self.resident} of {len(self.adapter.layers)} layers resident"
        row["dense_kernels_s"] = {each: median(found[each].whole_s) for each in WAYS}
        row["dense_refused"] = {}
        row["dense_rounds_s"], row["method_rounds_s"] = dense.whole_s, own.whole_s
        row["dense_s"], row["method_s"] = median(dense.whole_s), median(own.whole_s)
        ratios = [a / b for a, b in zip(dense.whole_s, own.whole_s, strict=True)]
        interval = ratio_interval(ratios, [str(i) for i in range(len(ratios))])
        row["ratio"] = median(ratios)
        row["ratio_low"], row["ratio_high"] = (interval.low, interval.high) if interval else (None, None)
        row["dense_tokens_per_s"] = self.steps / median(dense.decode_s)
        row["method_tokens_per_s"] = self.steps / median(own.decode_s)
        row["dense_peak_bytes"], row["peak_bytes"] = dense.peak, own.peak
        note_masked(row, self.trace)
        if self.eager is not None:
            mark_eager(row, f"{self.method.name} was not recorded: {self.eager}" if self.eager else None)
        add_note(row, self._said(dense, own, row["method_tokens_per_s"] / row["dense_tokens_per_s"]))

    def _said(self, dense: _Timed, own: _Timed, alone: float) -> str:
        prompt, token = (
            each / GB for each in (dense.copied["prefill_bytes"], dense.copied["decode_bytes"] / TRIED_STEPS)
        )
        rehearsed = (
            "" if self.adapter.device.type == "cuda" else "no card: nothing was limited, no copy crossed a bus; "
        )
        roomy = "every layer fits there, and one streams all the same; " if self.roomy else ""
        return (
            f"{rehearsed}{self.limit / GB:g} GB of the card; {roomy}"
            f"seconds are prefill and {self.steps} tokens, decoding alone is {alone:.3g}x; "
            f"dense copies {prompt:.3g} GB a prompt and {token:.3g} GB a token, {self.method.name} "
            f"{own.copied['prefill_bytes'] / GB:.3g} GB a prompt, at {(self.bus or 0) / GB:.3g} GB/s; Python launches dense "
            f"attention while copies run"
        )
