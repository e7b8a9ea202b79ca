"""``methods.json`` as Markdown. Every number and every verdict is read from the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, groupby
from typing import Any

from vlmbench.claims_verdict import Verdict, counted, idle, judged, near, number, sentence, shown, signed
from vlmbench.reference.inside_format import table
from vlmbench.stats import paired_delta

Row = Mapping[str, Any]

LOSS, WORST = 0.02, 0.05
"""Against full attention: at most so much lost, and the interval's lower end above the latter."""
HALF = 0.5
TITLES = {
    "references": "what the numbers mean",
    "pevlm": "PEVLM",
    "mminference": "MMInference",
    "turbo": "Turbo",
    "corematching": "CoreMatching",
    "together": "two methods together",
    "memvp": "MemVP (trained)",
    "trivial": "trivial methods",
}
"""Bands of the table, in order."""
HEAD = (
    *("method", "n", "accuracy", "against full", "same answer"),
    *("tokens a layer", "tokens", "FLOPs", "KV", "tower"),
    *("best trivial at its budget", "minus it", "marks"),
)


def to_markdown(data: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [
        "# Every method on the tiny models",
        "Written from `methods.json` by `make methods`; do not edit. Generated videos and pictures, float32, all frames; no "
        "times, which other files of this folder have. Brackets are 95 % intervals clustered by video; a difference is over "
        "the same questions, and one that failed counts as wrong.",
        "*tokens a layer* are visual tokens that a layer of the language model processes, mean over layers and "
        "questions; *tokens*, *FLOPs* (prefill of the language model), *KV* (bytes when the answer is done: more of a longer "
        "answer) and *tower* (FLOPs of the vision tower, of methods that change it) are shares of full attention's. *best "
        "trivial at its budget* is the most accurate of `uniform`, `random` and, on videos, `downsample` with no more tokens a "
        "layer and FLOPs (the tower is not counted), chosen on the same questions, which flatters it; without an entry none "
        "spends so little. `below-trivial`: one of them is better beyond the error. A method saving neither is held against "
        "the trivial ones of its table, which all spend less.",
        f"Verdicts: *held* takes at most {100 * LOSS:.0f} points lost and an interval whose lower end is above "
        f"−{100 * WORST:.0f}; *did not hold* is an interval below −{100 * LOSS:.0f}; all else is *open*. Fewer than "
        f"{least_questions()} questions cannot show *held*, not even by equal answers to all. Of settings with the same tokens "
        "the one that spends most otherwise is judged. Every interval stands alone: of 40 comparisons one is expected "
        "to be beyond its error on the wrong side by chance.",
    ]
    parts += _overall(data["rows"])
    for model in dict.fromkeys(row["model"] for row in data["rows"] if row.get("flops_share") is not None):
        parts.append(f"![accuracy over cost, {model}](methods/{model}.png)")
    for suite in ordered(row["suite"] for row in data["rows"]):
        parts.append(f"## {suite}")
        for model in (each["model"] for each in data["models"]):
            rows = [row for row in data["rows"] if (row["model"], row["suite"]) == (model, suite)]
            parts += [f"**{model}**", *_place(rows)] if rows else [f"**{model}**: not measured."]
    parts += ["## Measured on", _machines(data["measured_on"])]
    return "\n\n".join(parts) + "\n"


def ordered(suites: Iterable[str]) -> list[str]:
    """Each once: videos from short to long, then pictures."""
    return sorted(set(suites), key=lambda suite: ("video" not in suite, len(suite), suite))


def least_questions() -> int:
    """So many must be asked before a method that answers every one as full attention does is shown to be near it."""
    for n in count(1):
        found = paired_delta([0.0] * n, [0.0] * n, range(n))
        if found is not None and found.low is not None and found.low > -WORST:
            return n
    raise AssertionError  # the interval of equal answers shrinks for ever


def _overall(rows: Sequence[Row]) -> Iterable[str]:
    """Of all settings of a method, models and suites: how many were worse or better than a trivial method."""
    held = [row for row in rows if row.get("rivals") and not idle(row)]
    if not held:
        return
    lines = []
    for band, title in TITLES.items():
        own = [row for row in held if row["band"] == band]
        worse = sum(row["below_trivial"] for row in own)
        better = sum(_beats(row) for row in own)
        near_full = sum(row["delta"] >= -LOSS for row in own)
        if own:
            counts = (len(own), worse, len(own) - worse - better, better, near_full)
            lines.append([title, *map(str, counts)])
    yield "## Against trivial methods that spend no more, everything here together"
    yield table(
        (
            *("method", "settings × suites × models", "one is better", "neither beyond the error"),
            *("better than the best", f"at most {100 * LOSS:.0f} points below full on these questions"),
        ),
        lines,
    )
    yield (
        "What follows from the rules alone: CoreMatching lets every token vote, so what is frequent is core, and a small or "
        "brief object on much background is the first to leave; its knee is no budget that could be set to half. PEVLM and "
        "MMInference leave out pairs and no token. Turbo merges before the question is known."
    )


def _beats(row: Row) -> bool:
    """Whether it is better than the best of its rivals beyond the error."""
    gaps = [each["gap_low"] for each in row["rivals"] if each["method"] == row["best"]]
    return not row["below_trivial"] and all(low is not None and low > 0 for low in gaps)


def _place(rows: Sequence[Row]) -> Iterable[str]:
    """One table, the verdict of every band, and what was refused."""
    measured = [row for row in rows if "refused" not in row]
    yield table(HEAD, [_line(row) for row in measured])
    lines = []
    for band in TITLES:
        own = [row for row in measured if row["band"] == band]
        if band not in ("references", "trivial") and own:
            lines.append(verdict(band, own))
    yield "\n".join(lines + [f"- Not run: `{row['method']}`: {row['refused']}" for row in rows if "refused" in row])


def _line(row: Row) -> list[str]:
    best = next((each for each in row.get("rivals", ()) if each["method"] == row.get("best")), None)
    marks = [*row["marks"], *(["below-trivial"] if row.get("below_trivial") else [])]
    return [
        f"`{row['method']}`",
        counted(row),
        shown(row, "accuracy"),
        signed(row, "delta") if "delta" in row else "—",
        number(row["agreement"], ".2f"),
        number(row["kept"], ".0f"),
        *(number(row[name], ".2f") for name in ("kept_share", "flops_share", "kv_share", "vision_share")),
        f"`{best['method']}`: {best['accuracy']:.2f}" if best else "—",
        signed(best, "gap") if best else "—",
        ", ".join(marks) or "—",
    ]


def verdict(band: str, rows: Sequence[Row]) -> str:
    """Whether the band comes within 2 points of full attention at half the tokens, at its setting nearest to half."""
    title = TITLES[band]
    known = [row for row in rows if row["kept_share"] is not None]
    at_half = [row for row in known if row["kept_share"] <= HALF * 1.001]
    if at_half:
        row = max(at_half, key=_spends)  # never by what it answered
        return sentence(
            judged(row, near(row, "delta", LOSS, WORST)),
            f"{title}, within 2 points of full attention at half the tokens: {signed(row, 'delta')} with "
            f"`{row['method']}` ({row['kept_share']:.0%} of the tokens){_than_trivial(row)}{_best_of(rows, row)}.",
        )
    if not known:
        return sentence(Verdict.MISSING, f"{title} at half the tokens: its work was not counted.")
    row = min(known, key=lambda row: (row["kept_share"], row["flops_share"]))
    if row["kept_share"] > 0.999:
        row = rows[0]
        return sentence(
            judged(row, near(row, "delta", LOSS, WORST)),
            f"{title}, within 2 points of full attention: {signed(row, 'delta')} with `{row['method']}` "
            f"({row['flops_share']:.0%} of the FLOPs; it keeps every token, so half of them is not asked of it).",
        )
    loss = judged(row, near(row, "delta", LOSS, WORST))
    return sentence(
        loss if loss is Verdict.FAILED else Verdict.IDLE,
        f"{title}, within 2 points of full attention at half the tokens: no setting here keeps so few; the least is "
        f"{row['kept_share']:.0%} with `{row['method']}`, {signed(row, 'delta')} "
        f"({'a loss already there' if loss is Verdict.FAILED else f'there: {str(loss).lower()}'}).",
    )


def _than_trivial(row: Row) -> str:
    """Whether what is lost is the method's or the budget's."""
    best = next((each for each in row.get("rivals", ()) if each["method"] == row["best"]), None)
    return f"; {signed(best, 'gap')} against `{best['method']}`, which spends as much" if best else ""


def _spends(row: Row) -> tuple[float, float, float]:
    tower = row.get("vision_share")
    return row["kept_share"], row["flops_share"], 1.0 if tower is None else tower


def _best_of(rows: Sequence[Row], judged_row: Row) -> str:
    """The fewest tokens at which nothing is lost on these questions, where that is another setting."""
    fine = [row for row in rows if row["kept_share"] is not None and row["delta"] >= -LOSS and not idle(row)]
    if not fine:
        return "; no setting here is within 2 points on these questions"
    row = min(fine, key=lambda row: row["kept_share"])
    if row["method"] == judged_row["method"]:
        return ""
    return f"; the fewest tokens within 2 points on these questions: {row['kept_share']:.0%} with `{row['method']}`"


def _machines(origins: Sequence[Mapping[str, str]]) -> str:
    ordered = sorted(origins, key=lambda each: each["on"])
    lines = []
    for on, group in groupby(ordered, key=lambda each: each["on"]):
        where = dict.fromkeys(f"{each['suite']} by {each['model']}" for each in group)
        lines.append(f"- {on} ({', '.join(where)})")
    return "\n".join(lines) or "Nothing."
