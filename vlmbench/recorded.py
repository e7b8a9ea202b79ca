"""Greedy decoding, the vision tower and a short prefill, recorded once and replayed: what a library that hides its launches
would do.

Each recording is compared with the call that it stands for, on other inputs than it was made with, before it is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from vlmbench.chunked import PATCHES
from vlmbench.graphs import NotRecordedError, Recorded, Recorder
from vlmbench.patch import Patcher

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vlmbench.layout import Prompt
    from vlmbench.models.base import Inputs, ModelAdapter

CLOSE = 1e-2
"""Largest root mean square of a replay's difference, of the result's own: bfloat16 rounds by less, a mistake by more."""


class Filled(NamedTuple):
    """A prompt's cache with room for the answer, its first token ``[1, 1]`` and that token's position."""

    cache: Cache
    token: Tensor
    position: int


@dataclass(frozen=True)
class Decoding:
    """A recording for each step, at that step's own length: no mask stands for keys that are not there yet."""

    filled: Filled
    """Held, since replays read and write its cache."""
    first: Tensor
    steps: list[Recorded]

    def restart(self) -> None:
        self.filled.token.copy_(self.first)

    def run(self) -> None:
        for step in self.steps:
            step.replay()
            int(self.filled.token)  # each id reaches the host before the next step, as in a run


@dataclass(frozen=True)
class Tower:
    """The vision tower over pixels that stay where they are."""

    inputs: Inputs
    recorded: Recorded

    def restart(self) -> None:
        """Nothing: the pixels are as they were."""

    def run(self) -> None:
        self.recorded.replay()


@dataclass(frozen=True)
class Prefill:
    """A prefill of a prompt whose tensors stay where they are; what a method prepares is made anew and copied into them."""

    prepare: Callable[[], Prompt]
    held: Prompt
    recorded: Recorded

    def restart(self) -> None:
        """Nothing: the cache is made inside."""

    def run(self) -> None:
        for ours, theirs in zip(_tensors(self.held), _tensors(self.prepare()), strict=True):
            if ours is not theirs:
                ours.copy_(theirs)
        self.recorded.replay()


def decoding(adapter: ModelAdapter, recorder: Recorder, filled: Filled, steps: int) -> Decoding:
    """Record `steps` tokens behind a filled cache. Raises `NotRecordedError`."""
    cache, token, position = filled
    first, held = token.clone(), [layer.physical for layer in cache.layers]
    given, right = first, []
    with without_masks(adapter):
        for step in range(steps):  # loads and tunes whatever the recordings need
            logits = adapter.decode(given, position + step, cache)
            right.append((given, logits))
            given = logits.argmax(-1, keepdim=True)
        for layer, physical in zip(cache.layers, held, strict=True):
            layer.physical = physical

        def one(step: int) -> Tensor:
            logits = adapter.decode(token, position + step, cache)
            token.copy_(logits.argmax(-1, keepdim=True))
            return logits

        made = [recorder.record(partial(one, step)) for step in range(steps)]
    for step, ((given, logits), recorded) in enumerate(zip(right, made, strict=True)):
        token.copy_(given)
        recorded.replay()
        _compare(recorded.result, logits, f"step {step} of decoding")
    return Decoding(filled, first, made)


def tower(adapter: ModelAdapter, recorder: Recorder, inputs: Inputs) -> Tower:
    """Record the vision tower over `inputs`. Raises `NotRecordedError`."""
    pixels = [each for key, each in inputs.items() if key.startswith("pixel")]
    with ready_made(adapter, inputs):
        adapter.encode_vision(inputs)
        recorded = recorder.record(lambda: adapter.encode_vision(inputs))
        for what in ("negative", "the same"):
            for each in pixels:
                each.neg_()
            recorded.replay()
            right = adapter.encode_vision(inputs)
            for ours, theirs in zip(recorded.result, right, strict=True):
                if theirs is not None:
                    _compare(ours, theirs, f"the vision tower on {what} pixels")
    return Tower(inputs, recorded)


def prefill(
    adapter: ModelAdapter, recorder: Recorder, prepare: Callable[[], Prompt], run: Callable[[Prompt], Tensor]
) -> Prefill:
    """Record `run` on what `prepare` gives. Raises `NotRecordedError`."""
    given = prepare()
    # Expanded tensors cannot be written to.
    extras = tree_map_only(Tensor, Tensor.contiguous, given.extras)
    held = replace(given, positions=given.positions.contiguous(), extras=extras)
    with without_masks(adapter):
        run(held)
        recorded = recorder.record(lambda: run(held))
    for what in ("negative", "the same"):
        held.embeds.neg_()
        recorded.replay()
        _compare(recorded.result, run(held), f"a prefill of {what} embeddings")
    return Prefill(prepare, held, recorded)


def _tensors(prompt: Prompt) -> list[Tensor]:
    return [each for each in tree_leaves([prompt.embeds, prompt.positions, prompt.extras]) if isinstance(each, Tensor)]


@contextmanager
def without_masks(adapter: ModelAdapter) -> Iterator[None]:
    """A single query sees every key that is held, and a whole prompt the keys before each query: neither needs a mask.

    While a stream is captured transformers makes one all the same (5.17: `is_tracing`), and SDPA then leaves its fast kernels.
    """
    text, kinds = adapter.text, getattr(adapter.text.config, "layer_types", None)
    with Patcher(adapter) as patch:
        if kinds is None:  # Llama makes one for all layers and takes none ready-made
            patch.attr(sys.modules[type(text).__module__], "create_causal_mask", lambda *args, **kwargs: None)
        else:
            masks = dict.fromkeys(kinds)
            patch.pre(text, lambda module, args, kwargs: (args, {**kwargs, "attention_mask": masks}))
        yield


@contextmanager
def ready_made(adapter: ModelAdapter, inputs: Inputs) -> Iterator[None]:
    """Hand a Qwen tower what follows from the frames' sizes alone: window order, rotary positions and sequence lengths.

    It works them out on the host at every call; `transformers.vision_utils` takes them as keywords for this very purpose.
    """
    if "video_grid_thw" not in inputs or len(inputs["pixel_values_videos"]) > PATCHES:  # then in pieces, each its own
        yield
        return
    from transformers import vision_utils

    visual, device = adapter._vision_model(), adapter.device
    grid = inputs["video_grid_thw"].cpu()
    made = {
        "position_ids": vision_utils.get_vision_position_ids(grid, visual.spatial_merge_size),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
    }
    if hasattr(visual, "window_size"):
        sizes = {name: getattr(visual, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        window = vision_utils.get_vision_window_index(grid, **sizes)
        made |= dict(zip(("window_index", "cu_window_seqlens"), window, strict=True))
    made = {name: each.to(device) for name, each in made.items()}
    with Patcher(adapter) as patch:
        patch.pre(visual, lambda module, args, kwargs: (args, {**kwargs, **made}))
        yield


def _compare(ours: Tensor, theirs: Tensor, what: str) -> None:
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not difference <= CLOSE:  # NaN is not close
        raise NotRecordedError(f"a replay of {what} is off by {difference:.2g} of its size; {CLOSE} is allowed")


def on_host(inputs: Inputs) -> Inputs:
    """Grids on the host, where the tower reads them; pixels stay on the device."""
    return {key: each.cpu() if key.endswith("thw") else each for key, each in inputs.items()}
