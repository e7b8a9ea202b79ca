"""Closed-form FLOPs of a prefill, from the model's shapes and the method's counted work."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmbench.method import Work
    from vlmbench.models.base import Shapes

FORMULA = (
    "language-model prefill, multiply-add = 2 FLOPs; per layer: tokens · 2 · (hidden · head_dim · (2·heads + 2·kv_heads) "
    "+ 3 · hidden · neurons) + pairs · 4 · heads · head_dim; plus 2 · hidden · vocabulary for the last position; "
    "plus what a method adds beside the layers (memvp: 4 · hidden · slots per token and layer, and its projector; mminference: "
    "2 · head_dim for each score that its patterns are chosen by, 4 · head_dim for each pair that is computed and masked; "
    "turbo's text side: 2 · head_dim for each of its scores)"
)
"""Printed under every table with a FLOPs column: published figures differ by what they count."""


def attention_flops(work: Work, shapes: Shapes) -> int:
    """Scores and weighted sums only."""
    return sum(work.pairs) * 4 * shapes.heads * shapes.head_dim


def flops(work: Work, shapes: Shapes) -> int:
    """By `FORMULA`. No tokens at all cost nothing, not even the head."""
    projections = shapes.hidden * shapes.head_dim * 2 * (shapes.heads + shapes.kv_heads)
    dense = sum(
        tokens * 2 * (projections + 3 * shapes.hidden * neurons)
        for tokens, neurons in zip(work.tokens, work.neurons, strict=True)
    )
    head = 2 * shapes.hidden * shapes.vocab if any(work.tokens) else 0
    return dense + attention_flops(work, shapes) + head + work.own_flops


def visual_tokens(work: Work, prompt: int, visual: int) -> float:
    """Visual tokens of a prompt of `prompt` tokens with `visual` such ones, mean over layers: those that left count no more.

    Methods drop no text, so what a layer lacks is visual.
    """
    return max(0.0, fmean(work.tokens) - (prompt - visual)) if work.tokens else 0.0


def to_json(work: Work, shapes: Shapes) -> dict[str, Any]:
    """The `work` field of a sample record."""
    found: dict[str, Any] = {
        "tokens": list(work.tokens),
        "pairs": list(work.pairs),
        "neurons": list(work.neurons),
        "flops": flops(work, shapes),
        "attention_flops": attention_flops(work, shapes),
    }
    if work.vision is not None:
        found |= {"vision_flops": work.vision.flops, "vision_dense_flops": work.vision.dense_flops}
    return found
