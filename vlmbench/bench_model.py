"""Whole stages of a model of a published shape with random weights: prefill, decode and vision, dense against a method.

The adapter, its cache and the method are those that `run` uses; only the prompt is made up. What a method works out for
a prompt (`prepare`) is inside its prefill time, as it is in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmbench import cost
from vlmbench.bench import add_note, add_shares, close_row, mark_masked, new_row, note_masked, prepared, ran_out
from vlmbench.cache import new_cache
from vlmbench.dense import Flex, backends, label, only
from vlmbench.errors import RunError, UsageError
from vlmbench.kernels.block_attention import forget
from vlmbench.layout import Prompt
from vlmbench.madeup import Shape, after_clip, frames_per_unit, noise
from vlmbench.patch import Patcher
from vlmbench.rounds import Clock, Side, fastest, out_of_memory, peak_bytes, race
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
) -> dict[str, Any]:
    """One row; out of memory ends it with the mark ``oom``. Raises `UsageError` when there is nothing to time."""
    _refuse(op, method, shape, layers, steps)
    found = new_row(op, method, shape, device, dtype)
    try:
        bench = _Bench(_load(shape, layers, device, dtype, seed), method, shape, device, dtype, rounds, steps, seed)
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
    if shape.batch != 1:
        raise UsageError(f"bench {op} takes one prompt at a time; --batch is {shape.batch}.")
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

    # -- operations -------------------------------------------------------------------------------------------------------

    def prefill(self, row: dict[str, Any]) -> None:
        (dense_prompt, own_prompt), trace = self._prompts()
        less = self._prepared(row, own_prompt, trace)
        mark_masked(row, trace, self.device)
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
        work = self.method.work(less, shapes, trace)
        if less.extras.get("block_plan") is not None:
            row["pairs_limit"] = sum(plain.pairs) / sum(work.pairs)
        add_shares(row, self.device, self.dtype, cost.prefill(plain, shapes, size), cost.prefill(work, shapes, size))

    def decode(self, row: dict[str, Any]) -> None:
        (dense_prompt, own_prompt), trace = self._prompts()

        def filled(prompt: Prompt) -> tuple[Any, Tensor, int]:
            cache = self.adapter.new_cache(self.steps)
            return cache, self.adapter.prefill(prompt, cache).argmax(-1, keepdim=True), prompt.next_position

        dense = self._dense_sides(self._decode, lambda _: filled(dense_prompt), self.shape.tokens)
        own = self._own_side(self._decode, lambda entered: filled(self.method.prepare(own_prompt, _fresh(entered))))
        best, own = self._race(row, dense, own)
        less = self._prepared(row, own_prompt, trace)
        if best is not None and row["per_layer"]:
            self._add_whole(row, self._rest(best), self._rest(own))
        row["dense_tokens_per_s"], row["method_tokens_per_s"] = (
            self.steps / row[key] if row[key] else None for key in ("dense_s", "method_s")
        )
        add_shares(row, self.device, self.dtype, self._decode_cost(dense_prompt.length), self._decode_cost(less.length))

    def vision(self, row: dict[str, Any]) -> None:
        from vlmbench.counted import vision_cost

        shape = _vision_shape(self.adapter, self.shape)
        trace = Trace()
        clip, less = _vision_clips(self.adapter, shape, self.method, trace)
        dense_inputs, own_inputs = (self.adapter.to_device(self.adapter.inputs([each], "")) for each in (clip, less))
        row |= {"frame_tokens": shape.frame_tokens, "tokens": shape.tokens}
        dense = self._dense_sides(self.adapter.encode_vision, lambda _: dense_inputs, 0)
        own = self._own_side(self.adapter.encode_vision, lambda _: own_inputs)
        self._race(row, dense, own, [*_tensors(dense_inputs), *_tensors(own_inputs)])
        dense_cost = vision_cost(self.adapter, dense_inputs)
        # Inside the tower only the method knows what it leaves out; fewer frames are counted by themselves.
        known = less is not clip or "vision" not in self.method.traits.stages
        own_cost = vision_cost(self.adapter, own_inputs) if known else None
        add_shares(row, self.device, self.dtype, dense_cost, own_cost)

    # -- what is timed ----------------------------------------------------------------------------------------------------

    def _prefill(self, prompt: Prompt) -> None:
        self.adapter.prefill(prompt, self.adapter.new_cache(1))

    def _prepare_and_prefill(self, given: tuple[Prompt, Trace]) -> None:
        prompt, trace = given
        self._prefill(self.method.prepare(prompt, _fresh(trace)))

    def _decode(self, given: tuple[Any, Tensor, int]) -> None:
        cache, token, position = given
        for step in range(self.steps):
            token = self.adapter.decode(token, position + step, cache).argmax(-1, keepdim=True)
            int(token)  # each id reaches the host before the next step, as in a run

    # -- sides ------------------------------------------------------------------------------------------------------------

    def _dense_sides(self, call: Any, ready: Any, tokens: int, *, flex: bool = False) -> dict[str, Side]:
        """`call` under every dense kernel that torch has here. `tokens` bounds the one that writes its scores down."""
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
        self, row: dict[str, Any], dense: dict[str, Side], own: Side, inputs: list[Tensor] | None = None
    ) -> tuple[Side | None, Side]:
        """The fastest dense side, and the method's own as it ran against it."""
        clock = Clock(self.device)
        best, seconds, refused = fastest(dense, clock)
        if best is None and not any("memory" in reason for reason in refused.values()):
            raise RunError(f"No dense attention kernel runs here ({'; '.join(refused.values()) or 'none known'}).")
        if best is not None and not self._replaces_attention():
            own = replace(own, around=partial(_both, best.around, own.around))
        run = race(best, own, self.rounds, clock)
        close_row(row, run, best, seconds, refused)
        known = [*self.adapter.model.parameters(), *self.adapter.model.buffers(), *(inputs or [])]
        if "method" not in run.failed:
            row["peak_bytes"] = peak_bytes(own, known, self.device)
        if best is not None and "dense" not in run.failed:
            row["dense_peak_bytes"] = peak_bytes(best, known, self.device)
        return best, own

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

    def _rest(self, side: Side) -> float:
        """Seconds of the same call without any layer: what the method plans, embedding, masks, norm and head."""

        @contextmanager
        def around() -> Iterator[Any]:
            with side.around() as entered, _without_layers(self.adapter):  # attached while the layers are there
                yield entered

        rest, clock = replace(side, around=around), Clock(self.device)
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


def embedded(adapter: ModelAdapter, shape: Shape, seed: int = 0) -> Prompt:
    """A made-up prompt with random embeddings and the family's own positions, on the model's device."""
    layout = shape.layout()
    generator = torch.Generator(adapter.device).manual_seed(seed)
    size = (1, layout.length, adapter.shapes.hidden)
    embeds = torch.randn(size, device=adapter.device, dtype=adapter.dtype, generator=generator)
    positions = torch.arange(layout.length)[None]
    if adapter.decode_positions(0).dim() == 3:
        from vlmbench.models.qwen_vl import mrope_positions

        positions = mrope_positions(layout, [1.0])[:, None]
    return Prompt(embeds, positions.to(adapter.device), layout, int(positions.max()) + 1)


def _vision_shape(adapter: ModelAdapter, shape: Shape) -> Shape:
    """`shape` with the tower's own number of tokens where it has only one. Raises `UsageError`."""
    if adapter.fixed_resolution:
        return replace(shape, frame_tokens=adapter._tokens_per_frame)  # type: ignore[attr-defined]
    rows, columns = shape.grid
    if columns > 200 * rows:
        raise UsageError(
            f"--frame-tokens {shape.frame_tokens} is {rows} × {columns}, which the processor refuses as too long a frame."
        )
    return shape


def _vision_clips(adapter: ModelAdapter, shape: Shape, method: Method, trace: Trace) -> tuple[Any, Any]:
    """Noise whose frames give just the shape's tokens, and what the method's `prepare_clip` leaves of it."""
    if adapter.fixed_resolution:
        height = width = adapter.vision_config.image_size
    else:
        pixels = adapter.vision_config.patch_size * adapter.vision_config.spatial_merge_size
        height, width = (side * pixels for side in shape.grid)
        for part in (adapter.processor.image_processor, adapter.processor.video_processor):
            part.size = {"shortest_edge": 1, "longest_edge": 2**62}  # as they are: no frame is resized
    clip = noise(shape.frames * frames_per_unit(adapter), height, width)
    return clip, method.prepare_clip(clip, trace)


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


@contextmanager
def _both(first: Any, second: Any) -> Iterator[Any]:
    with ExitStack() as stack:
        stack.enter_context(first())
        yield stack.enter_context(second())


def _fresh(trace: Trace) -> Trace:
    """As the engine does before every sample."""
    trace.reset("bench")
    return trace


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [each for each in inputs.values() if isinstance(each, Tensor)]


def _full() -> Method:
    from vlmbench.methods.full import Full

    return Full()
