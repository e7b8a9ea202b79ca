"""Token budgets: how many visual tokens a method may keep, keeping exactly those, and who spends as much as a method does.

A method is held against `random`, `uniform` and `downsample` at its own budget: no more visual tokens a layer, and no more
FLOPs of the language model's prefill. So a method that keeps every token, and attends to fewer pairs of them, has rivals too.
The vision tower is not counted: at equal tokens `downsample` and Turbo spend less there, `random` and `uniform` all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from vlmbench.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmbench.layout import Prompt
    from vlmbench.record import SampleRecord
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


TRIVIAL = ("random", "uniform", "downsample")
"""What every method that spends less must be better than at its own budget."""
ROUNDING = 1.001
"""By which a rival may spend more: records keep seven digits, and a token is the least that can be added."""


class Spent(NamedTuple):
    """What a run spends on a sample, on average: of a method that keeps what it likes of each, a median would tell half."""

    tokens: float
    """Visual tokens that a layer processes, mean over layers."""
    flops: float
    """Of the language model's prefill."""
    attention_flops: float
    text: float
    """Tokens of the prompt that are not visual."""

    def within(self, other: Spent) -> bool:
        """Whether this is no more than `other` spends, of tokens and of FLOPs."""
        return self.tokens <= other.tokens * ROUNDING and self.flops <= other.flops * ROUNDING


def spent(records: Iterable[SampleRecord]) -> Spent | None:
    """Of the samples whose work was counted; None where none was, or by a version that did not count tokens a layer."""
    known = [each for each in records if each.work and "visual_tokens" in each.work and "visual" in each.tokens]
    if not known:
        return None
    works = [each.work or {} for each in known]
    return Spent(
        tokens=fmean(work["visual_tokens"] for work in works),
        flops=fmean(work["flops"] for work in works),
        attention_flops=fmean(work["attention_flops"] for work in works),
        text=fmean(each.tokens["prompt"] - each.tokens["visual"] for each in known),
    )


def matched(own: Spent, full: Spent) -> int:
    """The most visual tokens that may be kept before layer 0 without spending more than `own`; `full` is full attention's.

    With n tokens in the prompt attention costs n·(n + 1) parts and the rest n: exact but for the head's one position.
    """
    counts = range(int(min(own.tokens, full.tokens) * ROUNDING) + 1)
    return max(0, bisect_right(counts, own.flops * ROUNDING, key=lambda n: _flops(n, full)) - 1)


def _flops(tokens: int, full: Spent) -> float:
    """Of full attention over a prompt with `tokens` visual tokens."""
    now, then = full.text + tokens, full.text + full.tokens
    rest = full.flops - full.attention_flops
    return full.attention_flops * (now * (now + 1)) / (then * (then + 1)) + rest * now / then


def rivals(tokens: int, full: Spent, frames: int | None) -> dict[str, float]:
    """Specs of `TRIVIAL` -> the visual tokens that each keeps, `tokens` at most; none where nothing is left or saved.

    `downsample` takes whole pairs of frames, which is what a Qwen-VL makes tokens of, and so may stay below.
    """
    if not 0 < tokens < full.tokens:
        return {}
    found = {f"uniform:tokens={tokens}": float(tokens), f"random:tokens={tokens}": float(tokens)}
    if frames and (pairs := int(frames * tokens / full.tokens) // 2):
        share = 2 * pairs / frames
        found[f"downsample:ratio={share:.6g}"] = share * full.tokens
    return found
