"""How much of each head's attention a pattern keeps: recall by layer and head, inside a model or on planted heads.

Exact on `ROWS` queries spread over the whole prompt: their softmax over every key before them, summed over the keys that the
pattern lets them see. The trace's own recall is of the last few queries alone, which the index was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmbench.mm_attention import attention
from vlmbench.mm_patterns import Head, Scene
from vlmbench.mm_planted import Seen, plant
from vlmbench.patch import Patcher

if TYPE_CHECKING:
    from torch import nn

    from vlmbench.layout import Prompt
    from vlmbench.madeup import Shape
    from vlmbench.methods.mminference import Mminference
    from vlmbench.models.base import ModelAdapter

ROWS = 64


def head_recall(
    q: Tensor, k: Tensor, heads: Sequence[Head], scene: Scene, *, scale: float | None = None
) -> tuple[Tensor, float]:
    """``q [1, H, N, D]``, ``k [1, Hkv, N, D]``: recall ``[H]``, and the allowed pairs over all causal ones.

    Boundaries are left out: what is asked is how good a pattern is on the whole sequence.
    """
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    alone = [replace(head, inter="none") for head in heads]
    _, did = attention(q, k, k, alone, scene, scale=scale, probe=False, dry=True)
    rows = torch.linspace(0, n - 1, min(ROWS, n), device=q.device).long()
    scores = q[0, :, rows].float() @ k[0].repeat_interleave(groups, 0).transpose(-1, -2).float()
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    later = torch.arange(n, device=q.device) > rows[:, None]
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)  # [H, r, N]
    seen = Seen(did, q.shape[1])
    return (weights * seen.visible(rows)).sum(-1).mean(-1), seen.pairs / (n * (n + 1) / 2)


@torch.inference_mode()
def model_recall(
    adapter: ModelAdapter, prompt: Prompt, methods: Mapping[str, Mminference]
) -> dict[str, list[list[float]]]:
    """Name -> ``[layers][heads]``, each on what full attention's own layers hand on."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scene = Scene.of(prompt.layout)
    found: dict[str, list[list[float]]] = {name: [] for name in methods}

    def watch(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        for name, method in methods.items():
            heads = method.heads(scene, len(found[name]), q.shape[1])
            recall, _ = head_recall(q, k, heads, scene, scale=scaling)
            found[name].append([round(float(each), 4) for each in recall])
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **more)

    with Patcher(adapter) as patch:
        patch.attention(watch)
        adapter.prefill(prompt, adapter.new_cache(0))
    return found


@torch.inference_mode()
def planted_recall(shape: Shape, method: Mminference, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each kind of head that the method has on a made-up prompt with planted patterns: recall and density."""
    scene = Scene.of(shape.layout())
    heads = method.heads(scene, 0, shape.heads)
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(1, shape.tokens, count, shape.head_dim, generator=generator).transpose(1, 2)
        for count in (shape.heads, shape.kv_heads)
    )
    plant(heads, scene, q, k)
    rows = []
    for kind in dict.fromkeys(head.vision.kind for head in heads):
        own = [number for number, head in enumerate(heads) if head.vision.kind == kind]
        keys = [number * shape.kv_heads // shape.heads for number in own]
        recall, density = head_recall(q[:, own], k[:, keys], [heads[number] for number in own], scene)
        rows.append({"head": kind, "heads": len(own), "recall": float(recall.mean()), "density": density})
    return rows
