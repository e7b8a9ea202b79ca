"""A model without storage: its own stages followed on tensors that hold nothing, for FLOPs and peak bytes.

The real adapter code runs on torch's meta device, so that what is counted is what would run; nothing is loaded or computed.
Attention is stood in for by its output alone: fused kernels write no scores.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from vlmbench.cost import Cost
from vlmbench.live import LiveStorages
from vlmbench.models.loading import family_of
from vlmbench.patch import Patcher

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.method import Method
    from vlmbench.models.base import Inputs, ModelAdapter

FUSED = "vlmbench_fused"
META = torch.device("meta")


class Stage(NamedTuple):
    cost: Cost
    peak_bytes: int
    """Weights and pixels included."""


def _fused(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **_: Any) -> tuple[Tensor, None]:
    """A kernel that torch knows the FLOPs of and that keeps nothing but its output."""
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
    return out.transpose(1, 2), None


AttentionInterface.register(FUSED, _fused)


class _Followed(LiveStorages):
    """Live bytes on the meta device; small real tensors (grids, positions) join it when they meet a tensor there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Tensor) and leaf.device == META for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, _without_storage, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _without_storage(tensor: Tensor) -> Tensor:
    return tensor if tensor.device == META else torch.empty_like(tensor, device=META)


def model_without_storage(config: Any, dtype: torch.dtype) -> ModelAdapter:
    """The adapter of a configuration; it has shapes, and no weights and no processor."""
    config = deepcopy(config)
    family = family_of(config.model_type)
    for each in (config, config.vision_config):
        each._attn_implementation = "eager"  # which every class knows; the attention is stood in for
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META:
            model = family.model_class(config)(config)
    finally:
        torch.set_default_dtype(before)
    return family(model, None)


def weights(adapter: ModelAdapter) -> list[Tensor]:
    return [*adapter.model.parameters(), *adapter.model.buffers()]


@torch.inference_mode()
def vision(adapter: ModelAdapter, inputs: Inputs) -> Stage:
    """The tower over `inputs`, of an adapter without storage."""
    pixels = [each.to(META) for key, each in inputs.items() if key.startswith("pixel")]
    moved = {**inputs, **dict(zip((key for key in inputs if key.startswith("pixel")), pixels, strict=True))}
    adapter._vision_model().set_attn_implementation(FUSED)
    counter = FlopCounterMode(display=False)
    with counter, _Followed([*weights(adapter), *pixels]) as live:
        features = adapter.encode_vision(moved)
    found = tuple(each for each in features if each is not None)
    moved_bytes = sum(each.numel() * each.element_size() for each in (*adapter.tower_parameters(), *pixels, *found))
    return Stage(Cost(counter.get_total_flops(), moved_bytes), live.peak)


def vision_cost(adapter: ModelAdapter, inputs: Inputs, method: Method | None = None) -> Cost:
    """The same for an adapter with weights, which stays as it is, under a method that changes the tower or under none."""
    twin = model_without_storage(adapter.config, adapter.dtype)
    with nullcontext() if method is None else method.attach(twin):
        return vision(twin, {key: each.cpu() if key.endswith("thw") else each for key, each in inputs.items()}).cost


@torch.inference_mode()
def prefill_peak(adapter: ModelAdapter, prompt: Prompt, headroom: int) -> tuple[int, int]:
    """(peak bytes, bytes left behind) of a prefill by an adapter without storage: weights, prompt, cache and temporaries."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format), None

    cache = adapter.new_cache(headroom)
    with Patcher(adapter) as patch:
        patch.attention(attend)
        with _Followed([*weights(adapter), prompt.embeds]) as live:
            adapter.prefill(prompt, cache)
    return live.peak, live.current
