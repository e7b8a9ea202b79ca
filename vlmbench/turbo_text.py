"""Turbo's text-side reduction, off by default: fewer visual tokens from language layer to language layer.

In BLIP the text model's cross-attention says which image tokens the next layer gets; a decoder has no cross-attention, so here
the text behind the last medium asks: its attention to each visual token, summed over heads and queries. Tokens are dropped, not
merged; positions stay, and a dropped token's keys of earlier layers stay in those layers' caches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmbench.kernels.token_merge import keep_text_side
from vlmbench.layout import TokenLayout

if TYPE_CHECKING:
    from vlmbench.models.base import Shapes
    from vlmbench.patch import Patcher

LEAST = 0.2
"""Share of the visual tokens that every layer keeps, as in the authors' module."""


def visual_left(n_visual: int, layers: int, step: float) -> tuple[int, ...]:
    """Visual tokens that each layer works on: all in the first."""
    cut = (keep_text_side(n_visual, layer, step=step, least=LEAST) for layer in range(layers - 1))
    return (n_visual, *cut)[:layers]


def tail_of(layout: TokenLayout) -> int:
    """How many tokens ask: the text behind the last medium, or the last token where there is none."""
    visual = layout.indices("video", "image")
    return max(1, layout.length - (int(visual[-1]) + 1 if len(visual) else 0))


def scoring_flops(layout: TokenLayout, shapes: Shapes, step: float) -> int:
    """Of `attention_of_tail` in all layers that choose: queries times keys once more (multiply-add = 2)."""
    n = layout.n_visual
    left = visual_left(n, shapes.layers, step)
    keys = sum(layout.length - n + now for now, then in pairwise(left) if then < now)
    return 2 * tail_of(layout) * keys * shapes.heads * shapes.head_dim


class _Prefill:
    """Which tokens of the prompt are still there."""

    def __init__(self, layout: TokenLayout, layers: int, step: float, device: torch.device) -> None:
        visual = layout.indices("video", "image")
        self.length = layout.length
        self.left = visual_left(len(visual), layers, step)
        self.alive = torch.arange(layout.length, device=device)
        self.is_visual = torch.zeros(layout.length, dtype=torch.bool, device=device)
        self.is_visual[visual.to(device)] = True
        self.tail = tail_of(layout)
        self.chosen: Tensor | None = None
        """Of the tokens still there, those that the next layer gets."""

    def choose(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> None:
        if layer + 1 >= len(self.left) or self.left[layer + 1] == self.left[layer]:
            return
        visible = self.is_visual[self.alive]
        received = attention_of_tail(q, k, self.tail, scaling)
        received[-1] = float("inf")  # its logits are the answer's first token, visual or not
        order = torch.where(visible, received, float("-inf")).argsort(descending=True, stable=True)
        keep_visual = order[: self.left[layer + 1]]
        keep = (~visible).index_fill(0, keep_visual, True)
        count = len(self.alive) - self.left[layer] + self.left[layer + 1]
        self.chosen = (~keep).to(torch.int8).argsort(stable=True)[:count]  # as many whatever the data


def attention_of_tail(q: Tensor, k: Tensor, tail: int, scaling: float) -> Tensor:
    """``[n]``: attention to each of n keys of the last `tail` queries, summed over them and over heads.

    ``q [1, H, n, D]``, ``k [1, Hkv, n, D]``.
    """
    shared = q.shape[1] // k.shape[1]
    queries = q[0, :, q.shape[2] - tail :].unflatten(0, (-1, shared)).flatten(1, 2)  # [Hkv, shared · tail, D]
    logits = (queries @ k[0].transpose(-1, -2) * scaling).unflatten(1, (shared, tail))
    n = k.shape[2]
    ahead = torch.arange(n, device=q.device) > torch.arange(n - tail, n, device=q.device)[:, None]
    return logits.masked_fill(ahead, float("-inf")).softmax(-1, dtype=torch.float32).sum((0, 1, 2))


def install(patch: Patcher, step: float) -> None:
    """Through `patch`: attention that listens, and hooks before each layer that drop."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layers = patch.adapter.layers
    now: _Prefill | None = None

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        vlmbench_layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if vlmbench_layout is not None and now is not None:
            now.choose(module.layer_idx, q, k, scaling)  # type: ignore[arg-type]
        if mask is not None:  # made once from the first layer, which holds all; what was dropped was seen by everything
            mask = mask[..., -q.shape[2] :, -k.shape[2] :]
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)

    def before(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal now
            layout = kwargs.get("vlmbench_layout")
            if layout is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                now = _Prefill(layout, len(layers), step, hidden.device)
            assert now is not None  # noqa: S101 (layer 0 comes first)
            if now.chosen is not None:
                hidden, now.alive, now.chosen = hidden[:, now.chosen], now.alive[now.chosen], None
            cos, sin = kwargs["position_embeddings"]
            ids = kwargs.get("position_ids")
            changed = {
                **kwargs,
                "position_embeddings": (cos[..., now.alive, :], sin[..., now.alive, :]),
                "position_ids": None if ids is None else ids[..., now.alive],
            }
            kwargs["past_key_values"].layers[layer].evicted = now.length - len(now.alive)
            if args:
                return (hidden, *args[1:]), changed
            return args, {**changed, "hidden_states": hidden}

        return hook

    patch.attention(attend)
    for index, layer in enumerate(layers):
        patch.pre(layer, before(index))
