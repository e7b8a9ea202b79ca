"""What a model does inside while it answers one question: attention by kind of token, its concentration, shared neurons.

Pure functions on tensors, and `look` which gets the tensors from one prefill. A question of `synthvideo` is about one or two
events; the *needle* is every visual token of the temporal units in which one of them is visible.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from vlmbench.engine import generate
from vlmbench.layout import VISUAL, TokenLayout
from vlmbench.methods.full import Full
from vlmbench.patch import Patcher

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter
    from vlmbench.suite import Sample
    from vlmbench.suites._synth.scene import Event, Scene
    from vlmbench.video import Clip

CLASSES = ("sink", "needle", "other frames", "separators", "text")
"""Every prompt token is in exactly one of them."""
PROBED = ("colour", "shape", "place", "motion", "first", "last", "before", "after")
"""Question types about one or two events; the others are about all of them, and then everything is the needle."""
TOP_KEYS = 0.05
MIN_KEYS = 20
"""Fewest keys of a query whose concentration is measured: 5 % of them is one key."""
TOP_NEURONS = 0.1


class Inside(NamedTuple):
    """One prefill."""

    layout: TokenLayout
    attention: Tensor
    """``[L, H, N, N]``, queries before keys; rows sum to 1."""
    neurons: Tensor
    """``[L, N, D]``: what enters the FFN's down projection, act(gate) · up."""


def look(adapter: ModelAdapter, clip: Clip, question: str) -> Inside:
    """Prefill one question about one clip through the engine, with the family's eager attention, and keep what passes."""
    weights: list[Tensor] = []
    neurons: list[Tensor] = []

    def keep_weights(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        weights.append(output[1][0])

    def keep_neurons(module: nn.Module, args: tuple, kwargs: dict) -> None:
        neurons.append(args[0][0])

    full = Full()
    with adapter.attention("eager"), Patcher(adapter) as patch, full.attach(adapter) as trace:
        for layer in adapter.layers:
            patch.post(layer.self_attn, keep_weights)
            patch.pre(layer.mlp.down_proj, keep_neurons)
        done = generate(adapter, full, trace, [clip], question, max_new_tokens=1)
    return Inside(done.prompt.layout, torch.stack(weights).float(), torch.stack(neurons).float())


# -- which tokens ------------------------------------------------------------------------------------------------------


def events_of(sample: Sample, scene: Scene) -> list[Event]:
    """Events that must be seen to answer: the one named, or the first or last, or the one named and its neighbour.

    Raises `ValueError` for a type that is not in `PROBED`.
    """
    kind, events = sample.strata["type"], scene.events
    if kind not in PROBED:
        raise ValueError(f"a question of type {kind!r} is not about one or two events; those are {', '.join(PROBED)}.")
    if kind in ("first", "last"):
        return [events[0 if kind == "first" else -1]]
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\w+)", re.escape(sample.template))
    found = re.fullmatch(pattern, sample.question)
    slots = found.groupdict() if found else {}
    (named,) = (
        i
        for i, event in enumerate(events)
        if slots.get("color", event.colour) == event.colour and slots.get("shape", event.shape) == event.shape
    )
    other = {"before": [named - 1], "after": [named + 1]}.get(kind, [])
    return [events[i] for i in sorted([named, *other])]


def needle_units(events: Collection[Event], clip: Clip, n_units: int) -> set[int]:
    """Temporal units that show one of the events; a unit is one frame of the clip, or two where the model merges pairs."""
    frames_per_unit = -(-len(clip.indices) // n_units)
    return {
        position // frames_per_unit
        for position, frame in enumerate(clip.indices)
        if any(event.start <= frame < event.stop for event in events)
    }


def span_classes(layout: TokenLayout, needle: Collection[int]) -> dict[str, Tensor]:
    """Sorted token indices of every one of `CLASSES`, int64 each: a partition of the prompt. The sink is token 0."""
    found: dict[str, list[int]] = {name: [] for name in CLASSES}
    for span in layout:
        if span.kind in VISUAL:
            name = "needle" if span.frame in needle else "other frames"
        else:
            name = "separators" if span.kind == "separator" else "text"
        found[name] += range(max(span.start, 1), span.stop)
    return {name: torch.tensor(ids, dtype=torch.long) for name, ids in {**found, "sink": [0]}.items()}


def question_tokens(layout: TokenLayout) -> Tensor:
    """Text behind the last frame: the question and what the chat template puts after it, int64 ``[n]``."""
    ids = layout.indices("text")
    return ids[ids >= layout.units[-1].stop]


def other_units(needle: Collection[int], n_units: int) -> set[int]:
    """As many units as the needle has, as far as there are, spread evenly over those that do not show it."""
    left = [unit for unit in range(n_units) if unit not in needle]
    n = min(len(needle), len(left))
    return {left[int((i + 0.5) * len(left) / n)] for i in range(n)}


# -- attention ---------------------------------------------------------------------------------------------------------


def answer_shares(attention: Tensor, classes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention of the last prompt token, from which the answer is read, summed by class: ``[L, H]`` each, together 1.

    `attention`: ``[L, H, N, N]``.
    """
    last = attention[:, :, -1]
    return {name: last[..., ids.to(last.device)].sum(-1) for name, ids in classes.items()}


def top_share(attention: Tensor, queries: Tensor, top: float = TOP_KEYS) -> Tensor:
    """Attention mass on each query's `top` share of keys, averaged over `queries` with at least `MIN_KEYS` keys: ``[L, H]``.

    `attention`: ``[L, H, N, N]`` and causal; `queries`: int64 ``[n]``. A share of keys that is no whole number takes part of
    the next key, so that uniform attention gives `top` at every length. NaN where no query has enough keys.
    """
    queries = queries[queries >= MIN_KEYS - 1].to(attention.device)
    wanted = (queries + 1) * top  # keys are the query and all before it
    whole = wanted.floor().long()
    found = []
    for weights in attention:  # [H, N, N]; a layer at a time, since sorting copies
        rows = weights[:, queries].sort(-1, descending=True).values  # [H, n, N]
        sums = torch.cat([torch.zeros_like(rows[..., :1]), rows.cumsum(-1)], -1)
        at = whole.expand(len(rows), -1)[..., None]
        lower, upper = sums.gather(-1, at), sums.gather(-1, (at + 1).clamp(max=rows.shape[-1]))
        found.append((lower + (upper - lower) * (wanted - whole)[:, None]).mean((1, 2)))
    return torch.stack(found)


# -- neurons -----------------------------------------------------------------------------------------------------------


def core_neurons(neurons: Tensor, top: float = TOP_NEURONS) -> Tensor:
    """The `top` share of neurons that a set of tokens uses most, bool ``[L, D]``; `neurons`: ``[L, n, D]`` of these tokens.

    A token uses its `top` share of neurons by magnitude; counted over the tokens, ties broken by summed magnitude. CoreInfer
    (arXiv 2410.18311) and CoreMatching (arXiv 2505.19235) count positive activations only, and other shares.
    """
    magnitude = neurons.abs()
    k = _n_core(magnitude.shape[-1], top)
    used = torch.zeros_like(magnitude).scatter_(-1, magnitude.topk(k, -1).indices, 1.0)
    total = magnitude.sum(1).double()
    # The sum scaled below 1 decides only between neurons of equal count.
    rank = used.sum(1).double() + total / (total.amax(-1, keepdim=True) * 2 + 1e-30)
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, rank.topk(k, -1).indices, True)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of two sets, both bool ``[L, D]``: ``[L]``."""
    return (a & b).sum(-1) / (a | b).sum(-1)


def chance_overlap(n_neurons: int, top: float = TOP_NEURONS) -> float:
    """Expected `overlap` of two core sets drawn at random (hypergeometric)."""
    from scipy.stats import hypergeom

    k = _n_core(n_neurons, top)
    return float(hypergeom(n_neurons, k, k).expect(lambda shared: shared / (2 * k - shared)))


def _n_core(n_neurons: int, top: float) -> int:
    return max(1, round(top * n_neurons))
