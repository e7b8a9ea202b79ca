"""Whole stages of a model of a published shape with random weights: prefill, decode and vision, dense against a method.

The adapter, its cache and the method are those that `run` uses; only the prompt is made up. What a method works out for
a prompt (`prepare`) is inside its prefill time, as it is in every run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmbench import cost
from vlmbench.bench_row import add_note, add_shares, mark_masked, new_row, note_masked, ran_out
from vlmbench.bench_sides import Sides
from vlmbench.errors import UsageError
from vlmbench.graphs import recorder
from vlmbench.kernels.block_attention import forget
from vlmbench.layout import Prompt
from vlmbench.madeup import Shape, vision_clips, vision_shape
from vlmbench.method import one_token
from vlmbench.recorded import Decoding, Filled, Prefill, Tower, decoding, on_host, prefill, tower
from vlmbench.rounds import first_line, out_of_memory
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.method import Method, Work
    from vlmbench.models.base import Inputs, ModelAdapter

SHORTENS = {
    "prefill": frozenset({"frames", "prompt", "prefill"}),
    "decode": frozenset({"frames", "prompt", "decode"}),
    "vision": frozenset({"frames", "vision"}),
}
"""Operation -> `Traits.stages` that change it."""
RANKED_STEPS = 16
"""Steps of decoding after which the fastest dense kernel is known: recording as many takes seconds for each kernel."""


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

    `graphs` records decoding and vision, by default on CUDA (elsewhere `graphs.Tape` rehearses it), and a prefill where it is
    asked for; with `alone` the method is not raced.
    """
    _refuse(op, method, shape, layers, steps)
    found = new_row(op, method, shape, device, dtype)
    # A long prefill keeps the card busy without it.
    graphs = device.type == "cuda" and op != "prefill" if graphs is None else graphs
    try:
        adapter = _load(shape, layers, device, dtype, seed)
        method.check(adapter)
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


class _Bench(Sides):
    """What is timed in each operation, and what it costs."""

    def prefill(self, row: dict[str, Any]) -> None:
        (dense_prompt, own_prompt), trace = self.prompts()
        less = self.prepared(row, own_prompt, trace)
        mark_masked(row, trace, self.device)
        if less.extras.get("block_plan") is not None and self.shape.batch > 1:
            raise UsageError(f"{self.method.name} takes one prompt at a time; --batch is {self.shape.batch}.")
        dense = self.dense_sides(self._prefill, lambda _: dense_prompt, self.shape.tokens, prefill=True)
        ran = trace

        def ready(entered: Trace) -> tuple[Prompt, Trace]:
            nonlocal ran
            ran = entered
            forget()  # a new prompt: what kernels make from its plan is inside the time, once for all layers
            return own_prompt, entered

        def make(given: Prompt | tuple[Prompt, Trace]) -> Prefill:
            def prepare() -> Prompt:
                return self._prepared(given) if isinstance(given, tuple) else given

            return prefill(self.adapter, recorder(self.device), prepare, self._prefill)

        # The tables of a plan, which belong inside the time, would be made before a recording and never in it.
        recording = make if self.graphs and less.extras.get("block_plan") is None else None
        own = self.own_side(self._prepare_and_prefill, ready)
        best, own = self.race(row, dense, own, make=recording, in_order=self.ranks_apart)
        note_masked(row, ran)  # what the kernel refused at its launch is known now
        shapes, size = self.adapter.shapes, self.dtype.itemsize
        plain = _full().work(dense_prompt, shapes, Trace())
        work = self.method.work(less, shapes, ran)
        if less.extras.get("block_plan") is not None:
            row["pairs_limit"] = sum(plain.pairs) / sum(work.pairs)
        costs = [cost.prefill(each, shapes, size, self.shape.batch) for each in (plain, work)]
        if best is not None and row["per_layer"]:  # a method's trace of a model without layers says nothing
            again = None if "eager" in row["marks"] else recording
            self.add_whole(row, self.rest(best, again), self.rest(own, again))
        add_shares(row, self.device, self.dtype, *costs)

    def decode(self, row: dict[str, Any]) -> None:
        (dense_prompt, own_prompt), trace = self.prompts()
        ran, less = trace, own_prompt

        def filled(prompt: Prompt) -> Filled:
            cache = self.adapter.new_cache(self.steps)
            return Filled(cache, self.adapter.prefill(prompt, cache).argmax(-1, keepdim=True), prompt.next_position)

        def make(given: Filled, steps: int = self.steps) -> Decoding:
            return decoding(self.adapter, recorder(self.device), given, steps)

        def ready(entered: Trace) -> Filled:
            nonlocal ran, less
            ran, less = entered, self.method.prepare(own_prompt, _fresh(entered))
            return filled(less)

        dense = self.dense_sides(self._decode, lambda _: filled(dense_prompt), self.shape.tokens)
        own = self.own_side(self._decode, ready)
        if self.recording(row):
            brief = partial(make, steps=RANKED_STEPS) if self.steps > RANKED_STEPS else None
            best, own = self.race(row, dense, own, make=make, brief=brief)
        else:
            best, own = self.race(row, dense, own)
        self.prepared(row, own_prompt, trace)
        note_masked(row, ran)
        shapes, size = self.adapter.shapes, self.dtype.itemsize
        dense_works = [one_token(dense_prompt.length + step + 1, shapes) for step in range(self.steps)]
        found = [self.method.decode_work(less, shapes, ran, step, size) for step in range(self.steps)]
        works = [each for each in found if each is not None]  # what a method leaves out of a step is known to it alone
        if best is not None and row["per_layer"]:
            again = None if "eager" in row["marks"] else make
            self.add_whole(row, self.rest(best, again), self.rest(own, again))
        row["dense_tokens_per_s"], row["method_tokens_per_s"] = (
            self.steps / row[key] if row[key] else None for key in ("dense_s", "method_s")
        )
        own_cost = self._decode_cost(works) if works else None
        add_shares(row, self.device, self.dtype, self._decode_cost(dense_works), own_cost)

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
        dense = self.dense_sides(self.adapter.encode_vision, lambda _: dense_inputs, 0)
        own = self.own_side(self.adapter.encode_vision, lambda _: own_inputs)

        def make(given: Inputs) -> Tower:
            return tower(self.adapter, recorder(self.device), on_host(given))

        inputs = (_tensors(dense_inputs), _tensors(own_inputs))
        self.race(row, dense, own, inputs, make if self.recording(row) else None)
        dense_cost = vision_cost(self.adapter, dense_inputs)
        own_cost = None
        try:
            own_cost = vision_cost(self.adapter, own_inputs, self.method)
        except RuntimeError as error:  # a method that looks at data; what was timed stands
            add_note(row, f"its FLOPs could not be counted on a tower without data ({first_line(error)})")
        add_shares(row, self.device, self.dtype, dense_cost, own_cost)

    # -- what is timed ----------------------------------------------------------------------------------------------------

    def _prefill(self, prompt: Prompt) -> Tensor:
        many = self.shape.batch
        if many > 1:  # the same prompt so many times, without copies
            embeds, positions = prompt.embeds, prompt.positions
            rows = positions.expand(*positions.shape[:-2], many, -1)
            prompt = replace(prompt, embeds=embeds.expand(many, -1, -1), positions=rows)
        return self.adapter.prefill(prompt, self.adapter.new_cache(1))

    def _prepared(self, given: tuple[Prompt, Trace]) -> Prompt:
        prompt, trace = given
        return self.method.prepare(prompt, _fresh(trace))

    def _prepare_and_prefill(self, given: tuple[Prompt, Trace]) -> None:
        self._prefill(self._prepared(given))

    def _decode(self, given: Filled) -> None:
        cache, token, position = given
        for step in range(self.steps):
            token = self.adapter.decode(token, position + step, cache).argmax(-1, keepdim=True)
            int(token)  # each id reaches the host before the next step, as in a run

    def _decode_cost(self, works: list[Work]) -> cost.Cost:
        """Of all steps."""
        each = [cost.decode(work, self.adapter.shapes, self.dtype.itemsize) for work in works]
        return cost.Cost(sum(one.flops for one in each), sum(one.bytes for one in each))


def _fresh(trace: Trace) -> Trace:
    """As the engine does before every sample."""
    trace.reset("bench")
    return trace


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [each for each in inputs.values() if isinstance(each, Tensor)]


def _full() -> Method:
    from vlmbench.methods.full import Full

    return Full()
