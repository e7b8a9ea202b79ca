"""``mminference.json`` as Markdown. Every number and every verdict is read from the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from vlmbench.claims_verdict import Verdict, counted, direction, near, number, sentence, shown, signed
from vlmbench.methods_text import LOSS, WORST, least_questions
from vlmbench.needles_plots import short
from vlmbench.reference.inside_format import table

Row = Mapping[str, Any]
HALF = 0.5
"""Pairs of full attention's that a setting may compute to be judged."""
COLUMNS = ("pattern", "pairs of full", "FLOPs of full", "recall", "n", "accuracy", "against full")


class Part(NamedTuple):
    title: str
    said: str
    tell: Callable[[Sequence[Row]], Iterable[str]]
    """Tables and sentences of one model's rows."""


def to_markdown(data: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [
        "# MMInference: needles, accuracy against cost, and recall",
        "Written from `mminference.json` by `make needles`; do not edit. Generated videos, all frames, float32, on a CPU. "
        "Brackets are 95 % intervals clustered by video; a difference is over the same questions, and one that failed counts "
        "as wrong. *Pairs* are the query-key pairs that patterns allow, *FLOPs* those of the whole prefill, with the corners "
        "of masks and the scores that indices come from; both over full attention's. *Recall* is the attention of the last "
        "queries that a pattern keeps; it compares patterns under one boundary and no boundaries with each other, since q also "
        "asks the last visual queries, and 2d only of the attention inside a modality. Under both, text rows have a pattern of "
        "their own, vertical-slash unless `text=dense`: what a boundary earns is earned with it. `fitted` comes from one train "
        "prompt (`vlmbench fit`); which error the search compares was chosen on train questions, after probes on test ones "
        "that another rule came from; `vs,budget=2` joined the curve after a look at the others on 16 questions. K-boundary is "
        "`none`: a pattern's indices hold for every row.",
        f"Verdicts: *held* takes at most {100 * LOSS:.0f} points lost and an interval whose lower end is above "
        f"−{100 * WORST:.0f}, which fewer than {least_questions()} questions cannot show, not even by equal answers to all; "
        f"*did not hold* is an interval below −{100 * LOSS:.0f}; all else is *open*. Every interval stands alone.",
    ]
    for name, part in PARTS.items():
        parts += [f"## {part.title}", part.said]
        for model in data["models"]:
            rows = [row for row in data["rows"] if (row["part"], row["model"]) == (name, model)]
            if not rows:
                parts.append(f"**{model}**: not measured.")
                continue
            parts += [f"**{model}**", f"![{part.title}, {model}](mminference/{name}-{model}.png)", *part.tell(rows)]
    parts += ["## Measured on", "\n".join(f"- {each}" for each in sorted(data["measured_on"])) or "Nothing."]
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> list[str]:
    relative = [number(row[name], ".2f") for name in ("pairs_relative", "flops_relative", "recall")]
    delta = signed(row, "delta") if "delta" in row else "—"
    return [f"`{row['method']}`", *relative, counted(row), shown(row, "accuracy"), delta]


def _needles(rows: Sequence[Row]) -> Iterable[str]:
    """All cells of a map together, and what boundaries change."""
    whole = [row for row in rows if "depth" not in row and "asks" not in row]
    yield table(list(COLUMNS), [_line(row) for row in whole])
    yield from _told_apart(whole)
    if asks := [row for row in rows if "asks" in row]:
        kinds = list(dict.fromkeys(row["asks"] for row in asks))
        at = {(row["method"], row["asks"]): row for row in asks}
        methods = list(dict.fromkeys(row["method"] for row in asks))
        yield table(
            ["pattern", *(f"needle in {kind} ({at[methods[0], kind]['n']})" for kind in kinds)],
            [[f"`{method}`", *(shown(at[method, kind], "accuracy") for kind in kinds)] for method in methods],
        )
    gains = [row for row in whole if "gain" in row]
    yield "\n".join(
        f"- {short(row['method']).partition(',')[0]} under `boundary={row['method'].partition('boundary=')[2]}` against none: "
        f"{signed(row, 'gain')}, {direction(row, 'gain')}; {number(row['pairs_relative'], '.2f')} of full attention's pairs."
        for row in gains
    )


def _told_apart(rows: Sequence[Row]) -> Iterable[str]:
    """How many settings these questions cannot tell from full attention."""
    full = [row for row in rows if row["method"] == "full"]
    others = [row for row in rows if row["method"] != "full"]
    alike = [row for row in others for each in full if row["accuracy"] >= each["accuracy"]]
    if len(alike) > 1:
        yield (
            f"{len(alike)} of {len(others)} settings answer at least as many of the {full[0]['n']} questions as full "
            f"attention: these questions cannot say which of those is better."
        )


def _curve(rows: Sequence[Row]) -> Iterable[str]:
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        yield f"`{suite}`:\n\n" + table(list(COLUMNS), [_line(row) for row in own])
        fair = [row for row in own if "delta" in row and round(row["pairs_relative"], 2) <= HALF]  # as the table has it
        lines = [
            sentence(
                verdict,
                f"`{row['method']}`, within {100 * LOSS:.0f} points of full attention: {signed(row, 'delta')} "
                f"({number(row['pairs_relative'], '.0%')} of the pairs, {number(row['flops_relative'], '.0%')} of the FLOPs).",
            )
            for row in fair
            for verdict in [near(row, "delta", LOSS, WORST)]
        ]
        yield (
            "\n".join(lines) or f"- **{Verdict.MISSING}**: no setting computes at most half of full attention's pairs."
        )


def _recall(rows: Sequence[Row]) -> Iterable[str]:
    heads = [row for row in rows if "suite" in row]
    lines = []
    for row in heads:
        layers = [fmean(layer) for layer in row["recall"]]
        least = min(each for layer in row["recall"] for each in layer)
        cells = [f"{each:.2f}" for each in layers]
        lines.append([row["suite"], row["pattern"], *cells, f"{fmean(layers):.2f}", f"{least:.2f}"])
    count = len(heads[0]["recall"])
    yield table(["prompt", "pattern", *(f"layer {n}" for n in range(count)), "mean", "worst head"], lines)
    planted = [row for row in rows if "planted" in row]
    yield f"Planted heads of the fixed workload's mix ({planted[0]['planted']} tokens):\n\n" + table(
        ["head", "heads", "density", "recall"],
        [[row["head"], str(row["heads"]), f"{row['density']:.3f}", f"{row['recall']:.3f}"] for row in planted],
    )


PARTS: dict[str, Part] = {
    "curve": Part(
        "Accuracy against cost",
        "Asked by us: at most 2 points below full attention at half of its pairs, with the lower end of the interval above −5.",
        _curve,
    ),
    "maps": Part(
        "Needles in videos",
        "V-NIAH: one event of one to three frames in a video, at a depth of it, and its colour asked for. The paper, on "
        "LongVILA: full 98.3, MMInference 97.7, MInference 96.7, strided 90.7, Tri-shape 85.7, fixed 59.3, A-shape 44.0.",
        _needles,
    ),
    "mixed": Part(
        "Needles in videos with text between the frames",
        "MM-NIAH: what is asked for lies in frames, in a caption, or in both (`synthmixed`). The paper: full 90.9, MMInference "
        "91.3, without boundaries 88.0, Tri-shape 73.8, A-shape 43.3.",
        _needles,
    ),
    "recall": Part(
        "Attention that each head's pattern keeps",
        "On 64 queries spread over one prompt, with published sizes scaled to its length; boundaries left out. The A-shape "
        "head of the planted mix looks at nothing: what it keeps is its share of the keys.",
        _recall,
    ),
}
"""In the order of the report."""
