"""CoreMatching inside a model: what prefill chooses, the tokens that leave after one layer, the FFN that decode uses.

What a prompt chose lives as long as its cache, so copied weights are freed with the sample, and every cache is decoded with its
own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from vlmbench.core_projection import contribution, spearman
from vlmbench.core_trace import pack_neurons
from vlmbench.kernels.core_neurons import (
    co_activation,
    compact,
    core_counts,
    core_set,
    core_tokens,
    gathered,
    matrix_of,
)
from vlmbench.kernels.int8_linear import Int8Matrix, has_kernel
from vlmbench.layout import select_extras
from vlmbench.offload import stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers.cache_utils import Cache

    from vlmbench.kernels.core_neurons import CompactFFN, Compare, GatheredFFN
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class CorePlan:
    """What the method does to a model of a known depth and width."""

    rho: float
    n_neurons: int
    """Core neurons of a layer."""
    width: int
    """All neurons of a layer."""
    select: int | None
    """The first layer that sees core tokens alone; None: no token leaves."""
    sparse: frozenset[int]
    """Layers whose FFN decodes with core neurons alone."""
    host: tuple[int, ...]
    """Layers whose whole FFN stays on the host and comes for prefill alone."""
    gathered: bool
    """Whether decoding reads gate and up by index instead of copies."""
    compare: Compare
    min_keep: int
    prune_early: bool
    """Whether layers before `select` drop keys and values of the tokens that leave."""
    spearman: bool

    def chooses(self, layer: int) -> bool:
        """Whether this layer's core neurons are needed."""
        return self.spearman or layer in self.sparse or layer + 1 == self.select


def stage(layer: int) -> str:
    """The name under which `Trace.kept` has the tokens that layer `layer` sees."""
    return f"layer {layer}"


@dataclass
class _Chosen:
    """Of one prompt."""

    length: int
    visual: Tensor
    """int64: visual tokens among those present at the layer at hand."""
    keep: Tensor | None = None
    """int64, sorted: the tokens that layers from `CorePlan.select` on see."""
    cut: dict[str, Any] = field(default_factory=dict)
    """Keywords that those layers are called with instead."""
    neurons: dict[int, Tensor] = field(default_factory=dict)
    ffn: dict[int, CompactFFN | GatheredFFN] = field(default_factory=dict)
    spearman: dict[str, float | None] = field(default_factory=dict)


class CoreRun:
    """The hooks of one attached method; made by `install`."""

    def __init__(self, plan: CorePlan, trace: Trace) -> None:
        self.plan = plan
        self.trace = trace
        self._known: WeakKeyDictionary[Cache, _Chosen] = WeakKeyDictionary()
        # Of the forward pass at hand, and of none between two.
        self._now: _Chosen | None = None
        self._cache: Cache | None = None
        self._prefilling = False
        self._contribution: Tensor | None = None

    def install(self, patch: Patcher) -> None:
        plan = self.plan
        if plan.host:
            stream(patch, self.trace, plan.host, prefetch=True, again=False)
        patch.pre(patch.adapter.text, self._begin)
        patch.post(patch.adapter.text, self._end)
        if plan.spearman:
            patch.attention(self._attend)
        for index, layer in enumerate(patch.adapter.layers):
            if plan.select is not None and index >= plan.select:
                patch.pre(layer, partial(self._enter, index))
            if plan.chooses(index):
                patch.pre(layer.mlp.down_proj, partial(self._choose, index, layer.mlp))
            if index in plan.sparse:
                patch.forward(layer.mlp, partial(self._ffn, index, layer.mlp.act_fn, layer.mlp.forward))

    # -- hooks, in the order in which a forward pass meets them -------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        cache, layout = kwargs["past_key_values"], kwargs.get("vlmbench_layout")
        n = kwargs["inputs_embeds"].shape[1]
        self._cache, self._prefilling = cache, layout is not None
        if layout is None:
            self._now = self._known.get(cache)
            if self._now is not None and n > 1:
                raise ValueError(f"corematching takes generated tokens one at a time; {n} came at once")
            return
        self._now = None
        self._known.pop(cache, None)
        if layout.n_visual:
            if held := cache.get_seq_length():
                raise ValueError(f"the cache must be empty; it holds {held} tokens before the prompt")
            visual = layout.indices("video", "image").to(kwargs["inputs_embeds"].device)
            self._now = self._known[cache] = _Chosen(n, visual)

    def _enter(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A layer behind the removal."""
        now = self._now
        if now is None or now.keep is None:
            return None
        held = kwargs["past_key_values"].layers[index]
        if not self._prefilling:
            # One mask is made for all layers, from the first one's length. All of the past is seen: cut from the left.
            mask = kwargs.get("attention_mask")
            return None if mask is None else (args, {**kwargs, "attention_mask": mask[..., -(held.physical + 1) :]})
        held.evicted = now.length - len(now.keep)
        hidden = args[0]
        if index == self.plan.select:
            hidden = hidden[:, now.keep]
            now.cut = _cut(kwargs, now.keep)
        return (hidden, *args[1:]), {**kwargs, **now.cut}

    def _attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        **kwargs: Any,
    ) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if self._now is not None and self._prefilling:
            self._contribution = contribution(q[0, :, -1], k[0], v[0], scaling)
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)

    def _ffn(self, index: int, act: Callable[..., Tensor], dense: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self._now is None or self._prefilling:
            return dense(x)
        return self._now.ffn[index](x, act)

    def _choose(self, index: int, mlp: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What enters the down projection says which neurons and, at one layer, which tokens are core."""
        now, plan = self._now, self.plan
        if now is None or not self._prefilling:
            return
        activations = args[0][0]  # [tokens present, D]
        neurons = core_set(core_counts(activations, plan.rho), plan.n_neurons)
        if index in plan.sparse:
            now.neurons[index] = neurons
            gate, up, down = (matrix_of(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            if plan.gathered:
                now.ffn[index] = gathered(gate, up, down, neurons)
            else:
                now.ffn[index] = compact(gate, up, down, neurons)
            if isinstance(down, Int8Matrix) and not has_kernel(activations.device, activations.dtype, len(neurons)):
                self.trace.facts["dequantised"] = True
        selects = index + 1 == plan.select
        if selects or plan.spearman:
            scores = co_activation(activations[now.visual], neurons)
            if self._contribution is not None:
                now.spearman[str(index)] = spearman(scores, self._contribution[now.visual])
            if selects:
                self._select(now, scores, index + 1)

    def _select(self, now: _Chosen, scores: Tensor, first: int) -> None:
        """From layer `first` on there are the core tokens and all that is not visual, in order."""
        plan, trace = self.plan, self.trace
        # On the host: how many are kept must be known there, and this is the one time that prefill waits for the device.
        found, visual = core_tokens(scores.cpu(), plan.compare, plan.min_keep), now.visual.cpu()
        stays = torch.ones(now.length, dtype=torch.bool)
        stays[visual[~found.kept]] = False
        stays[-1] = True  # its logits are the answer's first token
        keep = stays.nonzero()[:, 0]
        trace.kept[stage(first)] = keep.tolist()
        trace.facts["core_tokens"] = {
            "kept": int(stays[visual].sum()),
            "of": len(visual),
            "threshold": found.knee.threshold,
            "bend": round(found.knee.bend, 4),
        }
        now.keep = keep.to(scores.device)
        now.visual = torch.searchsorted(keep, visual[stays[visual]]).to(scores.device)
        if plan.prune_early and self._cache is not None:
            for layer in self._cache.layers[:first]:
                layer.keep(now.keep)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        now, plan = self._now, self.plan
        if now is not None and self._prefilling:
            if plan.sparse:
                self.trace.facts["core_neurons"] = {
                    "kept": plan.n_neurons,
                    "of": plan.width,
                    "copied_bytes": sum(each.bytes for each in now.ffn.values()),
                    "layers": pack_neurons(now.neurons, plan.width),
                }
            if plan.spearman:
                self.trace.facts["spearman"] = now.spearman
            whole = now.keep is None or len(now.keep) == now.length
            if whole and (not plan.sparse or plan.n_neurons == plan.width):
                self.trace.inactive("every visual token and every neuron is kept")
        self._now = self._cache = self._contribution = None


def _cut(kwargs: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """Rotations, positions, mask, layout and extras of the kept tokens. The rotations are ``[…, N, D]`` with one or two axes
    before N.
    """
    cos, sin = kwargs["position_embeddings"]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    order = keep.tolist()
    layout = kwargs["vlmbench_layout"].select(order)
    return {
        **select_extras({name: value for name, value in kwargs.items() if hasattr(value, "selected")}, layout, order),
        "vlmbench_layout": layout,
        "position_embeddings": (cos[..., keep, :], sin[..., keep, :]),
        "position_ids": None if positions is None else positions[..., keep],
        "attention_mask": None if mask is None else mask[..., keep, :][..., keep],
    }
