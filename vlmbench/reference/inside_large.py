"""Where tiny models differ from large ones: what papers found on large models beside what was measured on these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

from vlmbench.reference.inside_format import Model, beyond, mean, percent, two


def differences(models: Mapping[str, Model]) -> str:
    """A Markdown list."""

    def told(tell: Callable[[Model], str]) -> str:
        return "; ".join(f"`{name}` {tell(found)}" for name, found in models.items())

    def sink(found: Model) -> str:
        values = found["probes"]["shares"]["sink"]
        over = sum(value > 0.5 for row in values for value in row)
        return f"{mean(values):.2f}, and more than half in {over} of {found['layers'] * found['heads']} heads"

    def visual(found: Model) -> str:
        shares = found["probes"]["shares"]
        by_layer = [fmean(a) + fmean(b) for a, b in zip(shares["needle"], shares["other frames"], strict=True)]
        return " ".join(f"{value:.2f}" for value in by_layer)

    def concentrated(found: Model) -> str:
        return f"{mean(found['probes']['top']['question']):.2f}"

    def neurons(found: Model) -> str:
        above, below = beyond(found["probes"]["overlap_more"])
        return f"in {above} of {found['layers']} layers, and less in {below}"

    def middle(found: Model) -> str:
        length = max(row["length"] for row in found["needle"])
        rows = {row["depth"]: row for row in found["needle"] if row["length"] == length}
        ends = sorted(rows)
        half = min(ends, key=lambda depth: abs(depth - 0.5))
        return (
            f"at {length} frames {two(rows[ends[0]])} at depth {ends[0]:g}, {two(rows[half])} at {half:g} and "
            f"{two(rows[ends[-1]])} at {ends[-1]:g}"
        )

    def length(found: Model) -> str:
        rows = sorted((row for row in found["types"] if row["type"] == "all"), key=lambda row: row["length"])
        return ", ".join(f"{two(row)} at {row['length']} frames" for row in rows)

    top = percent(next(iter(models.values()))["probes"]["top_keys"])
    said = [
        "**Attention sink.** Large language models give their first tokens much attention whatever those say (Xiao et al. "
        f"2023, arXiv 2309.17453). Mean share of the first token here: {told(sink)}. A method that protects the sink "
        "shows its worth here only as far as there is one.",
        "**Frames in late layers.** In large vision-language models visual tokens get little of the attention behind the "
        "first layers, which is why they can be dropped there (FastV, Chen et al. 2024, arXiv 2403.06764). The answer "
        f"token's share on all frames here, layer by layer: {told(visual)}.",
        "**Concentration.** In large language models a small set of keys holds most of the attention (H2O, Zhang et al. "
        f"2023, arXiv 2306.14048). The top {top} of keys hold here, for question tokens: {told(concentrated)}.",
        "**Co-activation.** CoreMatching (Wang et al. 2025, arXiv 2505.19235) rests on relevant visual tokens sharing more "
        "neurons with the prompt's core than other ones do, as found in LLaVA-1.5-7B. Here the needle shares more of them "
        f"with the question than other frames do, beyond the error: {told(neurons)}.",
        "**Middle of the context.** Large language models find facts at both ends of a long context more easily than in its "
        f"middle (Liu et al. 2023, arXiv 2307.03172). Here: {told(middle)}.",
        f"**Length.** Accuracy over all types: {told(length)}. That says nothing of a large model at the same length.",
        "**What they know.** Large models read open text and photographs. These were trained on the generator that also makes "
        "the test videos (from other seeds): a small vocabulary, coloured shapes, one style of background. Accuracies "
        "compare methods on these videos; they predict no accuracy elsewhere.",
        "**What carries over.** The code path is that of the large models of the family, so what a method does to "
        "positions, masks, caches and shapes is the same. How much accuracy it costs is not.",
    ]
    return "\n".join(f"- {each}" for each in said)
