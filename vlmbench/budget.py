"""Token budgets: how many visual tokens a method may keep, and keeping exactly those."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmbench.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmbench.layout import Prompt
    from vlmbench.trace import Trace


def check_budget(name: str, ratio: float, tokens: int | None) -> None:
    """Refuse ratios outside (0, 1] and token counts below 1."""
    if not 0 < ratio <= 1:
        raise UsageError(f"{name}:ratio must be above 0 and at most 1, not {ratio}.")
    if tokens is not None and tokens < 1:
        raise UsageError(f"{name}:tokens must be at least 1, not {tokens}.")


def budget(n_visual: int, ratio: float, tokens: int | None) -> int:
    """How many of `n_visual` tokens to keep: at least one where there are any."""
    if tokens is not None:
        return min(tokens, n_visual)
    return min(n_visual, max(1, round(ratio * n_visual))) if n_visual else 0


def keep_visual(prompt: Prompt, visual: Tensor, trace: Trace) -> Prompt:
    """Keep all text and separators and, of the visual tokens, only those at the sorted indices `visual`."""
    import torch

    if not prompt.layout.n_visual:
        trace.inactive("the prompt has no visual tokens")
    elif len(visual) == prompt.layout.n_visual:
        trace.inactive("the budget holds every visual token")
    keep = torch.cat([prompt.layout.indices("text", "separator"), visual]).sort().values
    trace.kept["prompt"] = keep.tolist()
    return prompt.select(keep)
