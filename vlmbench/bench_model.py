"""Whole stages of a model of a published shape with random weights: prefill, decode and vision, dense against a method.

The adapter, its cache and the method are those that `run` uses; only the prompt is made up. What a method works out for
a prompt (`prepare`) is inside its prefill time, as it is in every run.
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

from vlmbench import cost
from vlmbench.bench import add_note, add_shares, mark_masked, new_row, note_masked, prepared, ran_out
from vlmbench.cache import new_cache
from vlmbench.contest import Make, contest, mark_eager, recorded
from vlmbench.dense import Flex, backends, label, only
from vlmbench.errors import UsageError
from vlmbench.graphs import recorder
from vlmbench.kernels.block_attention import forget
from vlmbench.layout import Prompt
from vlmbench.madeup import Shape, after_clip, embedded, frames_per_unit, vision_clips, vision_shape
from vlmbench.parallel import ParallelEncoding
from vlmbench.patch import Patcher
from vlmbench.recorded import Decoding, Filled, Tower, decoding, on_host, tower
from vlmbench.rounds import Clock, Side, first_line, out_of_memory, peak_bytes, release
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.models.base import Inputs, ModelAdapter

SHORTENS = {
    "prefill": frozenset({"frames", "prompt", "prefill"}),
    "decode": frozenset({"frames", "prompt", "decode"}),
    "vision": frozenset({"frames", "vision"}),
}
"""Operation -> `Traits.stages` that change it."""
REST_REPEATS = 3


@torch.inference_mode()
def row(
    op: str,
    method: Method,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    layers: int | None,
    steps: int,
    seed: int,
    graphs: bool | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """One row; out of memory ends it with the mark ``oom``. Raises `UsageError` when there is nothing to time.

    `graphs` records decoding and vision, by default on CUDA (elsewhere `graphs.Tape` rehearses it); with `alone` the method
    is not raced.
    """
    _refuse(op, method, shape, layers, steps)
    found = new_row(op, method, shape, device, dtype)
    graphs = device.type == "cuda" if graphs is None else graphs
    try:
        adapter = _load(shape, layers, device, dtype, seed)
        bench = _Bench(adapter, method, shape, device, dtype, rounds, steps, seed, graphs, alone)
        found |= {
            "layers": bench.adapter.shapes.layers,
            "model_layers": layers_of(shape),
            "per_layer": op != "vision" and bench.adapter.shapes.layers < layers_of(shape),
            "steps": steps if op == "decode" else None,
        }
        getattr(bench, op)(found)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        ran_out(found, "the model or its inputs", error)
    return found


def layers_of(shape: Shape) -> int:
    """Layers of the language model that the preset names."""
    from vlmbench.models.presets import config_of

    return config_of(str(shape.name)).text_config.num_hidden_layers


def _refuse(op: str, method: Method, shape: Shape, layers: int | None, steps: int) -> None:
    from vlmbench.models.catalogue import PRESETS

    if shape.name is None:
        raise UsageError(f"bench {op} runs a model: name its --shape (one of {', '.join(PRESETS)}).")
    if op == "decode" and shape.batch != 1:
        raise UsageError(f"bench decode takes one prompt at a time; --batch is {shape.batch}.")
    if steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}.")
    if layers is not None and not 1 <= layers <= layers_of(shape):
        raise UsageError(f"--layers must be from 1 to {shape.name}'s {layers_of(shape)}, not {layers}.")
    if not method.traits.uses_model:
        raise UsageError(f"{method.name} never calls the model, so there is nothing to time.")
    if op == "vision" and not method.traits.sees_vision:
        raise UsageError(f"{method.name} encodes no frame, so there is nothing to time in vision.")
    stages = method.traits.stages
    if stages and not stages & SHORTENS[op]:
        raise UsageError(
            f"{method.name} changes nothing in {op}, so there is nothing to time (it acts in: {', '.join(sorted(stages))})."
        )


def _load(shape: Shape, layers: int | None, device: torch.device, dtype: torch.dtype, seed: int) -> ModelAdapter:
    from vlmbench.models.loading import load

    name = f"{shape.name}@random" + (f":layers={layers}" if layers else "")
    return load(name, dtype=dtype, device=str(device), attention="sdpa", seed=seed).adapter


@dataclass(frozen=True)
class _Bench:
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

    # -- operations -------------------------------------------------------------------------------------------------------

    def prefill(self, row: dict[str, Any]) -> None:
        (dense_prompt, own_prompt), trace = self._prompts()
        less = self._prepared(row, own_prompt, trace)
        mark_masked(row, trace, self.device)
        if less.extras.get("block_plan") is not None and self.shape.batch > 1:
            raise UsageError(f"{self.method.name} takes one prompt at a time; --batch is {self.shape.batch}.")
        dense = self._dense_sides(self._prefill, lambda _: dense_prompt, self.shape.tokens, flex=True)
        ran = trace

        def ready(entered: Trace) -> tuple[Prompt, Trace]:
            nonlocal ran
            ran = entered
            forget()  # a new prompt: what kernels make from its plan is inside the time, once for all layers
            return own_prompt, entered

        best, own = self._race(row, dense, self._own_side(self._prepare_and_prefill, ready))
        if ran.facts.get("masked"):  # what the kernel refused at its launch is known now
            trace.facts["masked"] = True
        note_masked(row, trace)
        if best is not None and row["per_layer"]:
            self._add_whole(row, self._rest(best), self._rest(own))
        shapes, size = self.adapter.shapes, self.dtype.itemsize
        plain = _full().work(dense_prompt, shapes, Trace())
        work = self.method.work(less, shapes, ran)
        if less.extras.get("block_plan") is not None:
            row["pairs_limit"] = sum(plain.pairs) / sum(work.pairs)
        costs = (cost.prefill(each, shapes, size, self.shape.batch) for each in (plain, work))
        add_shares(row, self.device, self.dtype, *costs)

    def decode(self, row: dict[str, Any]) -> None:
        (dense_prompt, own_prompt), trace = self._prompts()

        def filled(prompt: Prompt) -> Filled:
            cache = self.adapter.new_cache(self.steps)
            return Filled(cache, self.adapter.prefill(prompt, cache).argmax(-1, keepdim=True), prompt.next_position)

        def make(given: Filled) -> Decoding:
            return decoding(self.adapter, recorder(self.device), given, self.steps)

        dense = self._dense_sides(self._decode, lambda _: filled(dense_prompt), self.shape.tokens)
        own = self._own_side(self._decode, lambda entered: filled(self.method.prepare(own_prompt, _fresh(entered))))
        best, own = self._race(row, dense, own, make=make if self._recording(row) else None)
        less = self._prepared(row, own_prompt, trace)
        if best is not None and row["per_layer"]:
            again = None if "eager" in row["marks"] else make
            self._add_whole(row, self._rest(best, again), self._rest(own, again))
        row["dense_tokens_per_s"], row["method_tokens_per_s"] = (
            self.steps / row[key] if row[key] else None for key in ("dense_s", "method_s")
        )
        # What a method leaves out of a step is known to it alone; parallel encodings only weigh what they read.
        whole = "decode" not in self.method.traits.stages or isinstance(self.method, ParallelEncoding)
        own_cost = self._decode_cost(less.length) if whole else None
        add_shares(row, self.device, self.dtype, self._decode_cost(dense_prompt.length), own_cost)

    def vision(self, row: dict[str, Any]) -> None:
        from vlmbench.counted import vision_cost

        shape = vision_shape(self.adapter, self.shape)
        trace = Trace()
        clip, less = vision_clips(self.adapter, shape, self.method, trace)
        dense_inputs, *others = (
            self.adapter.to_device(self.adapter.inputs([each] * shape.batch, ""))
            for each in (clip, less)[: 1 if less is clip else 2]
        )
        own_inputs = others[0] if others else dense_inputs
        row |= {"frame_tokens": shape.frame_tokens, "tokens": shape.tokens}
        dense = self._dense_sides(self.adapter.encode_vision, lambda _: dense_inputs, 0)
        own = self._own_side(self.adapter.encode_vision, lambda _: own_inputs)

        def make(given: Inputs) -> Tower:
            return tower(self.adapter, recorder(self.device), on_host(given))

        inputs = (_tensors(dense_inputs), _tensors(own_inputs))
        self._race(row, dense, own, inputs, make if self._recording(row) else None)
        dense_cost = vision_cost(self.adapter, dense_inputs)
        own_cost = None
        try:
            own_cost = vision_cost(self.adapter, own_inputs, self.method)
        except RuntimeError as error:  # a method that looks at data; what was timed stands
            add_note(row, f"its FLOPs could not be counted on a tower without data ({first_line(error)})")
        add_shares(row, self.device, self.dtype, dense_cost, own_cost)

    # -- what is timed ----------------------------------------------------------------------------------------------------

    def _prefill(self, prompt: Prompt) -> None:
        many = self.shape.batch
        if many > 1:  # the same prompt so many times, without copies
            embeds, positions = prompt.embeds, prompt.positions
            rows = positions.expand(*positions.shape[:-2], many, -1)
            prompt = replace(prompt, embeds=embeds.expand(many, -1, -1), positions=rows)
        self.adapter.prefill(prompt, self.adapter.new_cache(1))

    def _prepare_and_prefill(self, given: tuple[Prompt, Trace]) -> None:
        prompt, trace = given
        self._prefill(self.method.prepare(prompt, _fresh(trace)))

    def _decode(self, given: Filled) -> None:
        cache, token, position = given
        for step in range(self.steps):
            token = self.adapter.decode(token, position + step, cache).argmax(-1, keepdim=True)
            int(token)  # each id reaches the host before the next step, as in a run

    # -- sides ------------------------------------------------------------------------------------------------------------

    def _dense_sides(self, call: Any, ready: Any, tokens: int, *, flex: bool = False) -> dict[str, Side]:
        """`call` under every dense kernel that torch has here. `tokens` bounds the one that writes its scores down."""
        if self.alone:
            return {}
        score_bytes = self.shape.heads * tokens**2 * 4
        sides = {label(each): Side(label(each), call, ready, only(each)) for each in backends(self.device, score_bytes)}
        if flex and self.device.type == "cuda":
            sides["flex"] = Side("flex", call, ready, partial(self._flex, Flex()))
        return sides

    @contextmanager
    def _flex(self, flex: Flex) -> Iterator[None]:
        with Patcher(self.adapter) as patch:
            patch.attention(flex.as_model_attention)
            yield

    def _own_side(self, call: Any, ready: Any) -> Side:
        return Side("method", call, ready, lambda: self.method.attach(self.adapter))

    def _race(
        self,
        row: dict[str, Any],
        dense: dict[str, Side],
        own: Side,
        inputs: tuple[list[Tensor], list[Tensor]] = ([], []),
        make: Make | None = None,
    ) -> tuple[Side | None, Side]:
        """The fastest dense side, and the method's own as it ran against it; peaks are those of unrecorded calls."""
        clock = Clock(self.device)
        best, own = contest(row, dense, own, self.rounds, clock, make, own_kernel=self._replaces_attention())
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

    def _recording(self, row: dict[str, Any]) -> bool:
        if not self.graphs:
            mark_eager(row)
        return self.graphs

    def _replaces_attention(self) -> bool:
        """A method that leaves attention alone runs under the best dense kernel too."""
        before = self.adapter.text.config._attn_implementation
        with self.method.attach(self.adapter):
            return bool(self.adapter.text.config._attn_implementation != before)

    # -- prompts and what is outside the layers -----------------------------------------------------------------------------

    def _prompts(self) -> tuple[tuple[Prompt, Prompt], Trace]:
        """The made-up prompt, and the one made of the frames that the method leaves."""
        trace = Trace(sample_id="bench")
        less = after_clip(self.method, self.shape, frames_per_unit(self.adapter), trace)
        prompt = embedded(self.adapter, self.shape, self.seed)
        return (prompt, prompt if less == self.shape else embedded(self.adapter, less, self.seed)), trace

    def _prepared(self, row: dict[str, Any], prompt: Prompt, trace: Trace) -> Prompt:
        """The prompt as the method leaves it, its time in `index_s`."""
        left, row["index_s"] = prepared(self.method, prompt, trace, Clock(self.device))
        if not trace.applied:
            add_note(row, f"nothing to do: {trace.reason}")
        return left

    def _rest(self, side: Side, make: Make | None = None) -> float:
        """Seconds of the same call without any layer: what the method plans, embedding, masks, norm and head."""

        @contextmanager
        def around() -> Iterator[Any]:
            with side.around() as entered, _without_layers(self.adapter):  # attached while the layers are there
                yield entered

        rest, clock = recorded(replace(side, around=around), make), Clock(self.device)
        rest.seconds(clock)
        return median(rest.seconds(clock) for _ in range(REST_REPEATS))

    def _add_whole(self, row: dict[str, Any], dense_rest: float, own_rest: float) -> None:
        """Layers are alike: the whole model takes the rest once and the layers' time as often as it has layers."""
        times = row["model_layers"] / row["layers"]
        for key, rest in (("dense", dense_rest), ("method", own_rest)):
            if (seconds := row[f"{key}_s"]) is not None:
                row[f"whole_{key}_s"] = rest + max(0.0, seconds - rest) * times

    def _decode_cost(self, keys: int) -> cost.Cost:
        shapes, size = self.adapter.shapes, self.dtype.itemsize
        each = [cost.decode(keys + step + 1, shapes, size) for step in range(self.steps)]
        return cost.Cost(sum(one.flops for one in each), sum(one.bytes for one in each))


@contextmanager
def _without_layers(adapter: ModelAdapter) -> Iterator[None]:
    """The language model with its layers taken out; caches keep their number of layers."""
    text, layers = adapter.text, adapter.text.layers
    text.layers = nn.ModuleList()
    adapter.new_cache = partial(new_cache, len(layers))  # type: ignore[method-assign]
    try:
        yield
    finally:
        text.layers = layers
        del adapter.new_cache


def _fresh(trace: Trace) -> Trace:
    """As the engine does before every sample."""
    trace.reset("bench")
    return trace


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [each for each in inputs.values() if isinstance(each, Tensor)]


def _full() -> Method:
    from vlmbench.methods.full import Full

    return Full()
