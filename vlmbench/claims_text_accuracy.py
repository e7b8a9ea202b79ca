"""The sentences and tables about accuracy: each takes one model's rows of its part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmbench.claims_study import QUESTIONS
from vlmbench.claims_verdict import (
    Verdict,
    above,
    counted,
    direction,
    idle,
    judged,
    near,
    number,
    sentence,
    shown,
    signed,
)
from vlmbench.reference.inside_format import table

Row = Mapping[str, Any]

STEPS = {
    "0, axes flattened": "blocks of tokens, each at the first one's positions, all axes in one",
    "0": "blocks of tokens, each at the first one's positions",
    "1": "sequential positions",
    "2": "blocks of frames",
    "3": "frames in the sink",
}
LOSS, WORST = 0.02, 0.05
"""Against full attention: at most so much lost, and the interval's lower end above the latter."""
MARGIN = 0.05
"""A change smaller than this is none worth naming."""


def lengths_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["length"] for row in rows})


def by(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], Row]:
    return {tuple(row[key] for key in keys): row for row in rows}


def ladder(rows: Sequence[Row]) -> Iterable[str]:
    for length in lengths_of(rows):
        at = by([row for row in rows if row["length"] == length], "step", "questions")
        steps = list(dict.fromkeys(step for step, _ in at))
        head = ["step", "what", "method", "n", *QUESTIONS, "gain, all", "gain, order", "against full"]
        lines = []
        for step in steps:
            row = at[step, "all"]
            cells = [shown(at[step, questions], "accuracy") for questions in QUESTIONS if (step, questions) in at]
            gains = [signed(at[step, questions], "gain") for questions in ("all", "order")]
            lines.append([step, STEPS[step], f"`{row['method']}`", counted(row), *cells, *gains, signed(row, "delta")])
        yield f"{length} frames:\n\n" + table(head, lines)
        yield "\n".join(_steps(at, length))


def _steps(at: Mapping[tuple[Any, ...], Row], length: int) -> Iterable[str]:
    for step in ("1", "2", "3"):
        row, order, before = at[step, "all"], at[step, "order"], at[str(int(step) - 1), "all"]
        if idle(row) != idle(before):
            n_idle = max(row["n_inactive"], before["n_inactive"])
            yield sentence(
                Verdict.IDLE,
                f"at {length} frames, {STEPS[step]}: one side had nothing to do on {n_idle} of {row['n']} "
                f"questions and equals full attention there.",
            )
            continue
        yield sentence(
            above(row, "gain"),
            f"at {length} frames, {STEPS[step]} bring {direction(row, 'gain')}, {signed(row, 'gain')}; on order questions "
            f"{signed(order, 'gain')}.",
        )
    first, *others = (at[step, "all"] for step in ("1", "2", "3"))
    if any(idle(row) for row in (first, *others)):
        return
    yield sentence(
        _largest(first, others),
        f"at {length} frames, of the three steps sequential positions gain most: {signed(first, 'gain')} against "
        f"{' and '.join(signed(each, 'gain') for each in others)}.",
    )


def _largest(first: Row, others: Sequence[Row]) -> Verdict:
    """Intervals that do not overlap: more than is needed, and never too little."""
    if any(row["gain_low"] is None for row in (first, *others)):
        return Verdict.OPEN
    if first["gain_low"] > max(row["gain_high"] for row in others):
        return Verdict.HELD
    return Verdict.FAILED if first["gain_high"] < max(row["gain_low"] for row in others) else Verdict.OPEN


def rivals(rows: Sequence[Row]) -> Iterable[str]:
    for length in lengths_of(rows):
        at = by([row for row in rows if row["length"] == length], "method", "questions")
        methods = list(dict.fromkeys(method for method, _ in at))
        head = ["method", "pairs of full", "n", *QUESTIONS, *(f"`pevlm` minus it, {each}" for each in QUESTIONS)]
        lines = []
        for method in methods:
            row = at[method, "all"]
            accuracies = [shown(at[method, each], "accuracy") for each in QUESTIONS]
            gaps = [signed(at[method, each], "delta") for each in QUESTIONS]
            lines.append([f"`{method}`", number(row["pairs_relative"], ".2f"), counted(row), *accuracies, *gaps])
        yield f"{length} frames:\n\n" + table(head, lines)
        yield "\n".join(_against(at, [each for each in methods if each != "pevlm"], length))


def _against(at: Mapping[tuple[Any, ...], Row], methods: Sequence[str], length: int) -> Iterable[str]:
    own = at["pevlm", "all"]
    for method in methods:
        row, order = at[method, "all"], at[method, "order"]
        if method == "full":
            verdict, what = near(row, "delta", LOSS, WORST), "loses at most 2 points against full attention"
        else:
            verdict, what = above(row, "delta"), f"is more accurate than `{method}`"
        if idle(own):
            yield sentence(Verdict.IDLE, f"at {length} frames PEVLM {what}: it had nothing to do on {counted(own)}.")
            continue
        yield sentence(
            verdict,
            f"at {length} frames PEVLM {what}: {signed(row, 'delta')}; on order questions {signed(order, 'delta')} "
            f"({direction(order, 'delta')}).",
        )


def grid(rows: Sequence[Row]) -> Iterable[str]:
    for length in lengths_of(rows):
        here = [row for row in rows if row["length"] == length]
        for questions in QUESTIONS[:2]:
            cells = [row for row in here if row["kind"] == "cell" and row["questions"] == questions]
            if not cells or cells[0]["accuracy"] is None:
                continue
            at = by(cells, "sink", "block")
            sinks, blocks = (sorted({row[axis] for row in cells}) for axis in ("sink", "block"))
            lines = [[f"sink {sink}", *(_cell(at[sink, block]) for block in blocks)] for sink in sinks]
            of = f"{length} frames, {questions} questions (n = {cells[0]['n']}): accuracy against full, and pairs of full"
            yield f"{of}\n\n" + table(["", *(f"block {block}" for block in blocks)], lines)
            yield "\n".join(_effects([row for row in here if row["questions"] == questions], cells, questions))


def _cell(row: Row) -> str:
    mark = " (nothing to do)" if idle(row) else ""
    return f"{signed(row, 'delta')}; {number(row['pairs_relative'], '.2f')}{mark}"


def _effects(rows: Sequence[Row], cells: Sequence[Row], questions: str) -> Iterable[str]:
    for row in (row for row in rows if row["kind"] == "effect"):
        yield sentence(
            _apart(row, "effect"),
            f"accuracy on {questions} questions depends on the {row['axis']}: {row['to']} instead of {row['from']} units "
            f"brings {signed(row, 'effect')}, averaged over the other parameter.",
        )
    best, (default,) = _best(cells), [row for row in rows if row["kind"] == "default"]
    yield (
        f"- The best of {len(cells)} by its estimate is sink {best['sink']}, block {best['block']} ({shown(best, 'accuracy')}; "
        f"picked among {len(cells)}, so expect less); the default gives {shown(default, 'accuracy')}."
    )


def _best(cells: Sequence[Row]) -> Row:
    """Of equal ones the cheapest."""
    return max(cells, key=lambda row: (row["accuracy"], -(row["pairs_relative"] or 0.0)))


def _apart(row: Row, name: str) -> Verdict:
    """Whether the interval leaves zero out; that there is no effect at all can never be shown."""
    return Verdict.HELD if above(row, name) is Verdict.FAILED else above(row, name)


def optima(rows: Sequence[Row]) -> list[str]:
    """The best settings of all models side by side; nothing with fewer than two."""
    best = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [row for row in rows if (row["model"], row["kind"], row.get("questions")) == (model, "cell", "all")]
        best[model] = _best(cells)
    if len(best) < 2:
        return []
    shown_ = "; ".join(f"{model}: sink {row['sink']}, block {row['block']}" for model, row in best.items())
    same = len({(row["sink"], row["block"]) for row in best.values()}) == 1
    return [f"Best by its estimate: {shown_}: {'the same' if same else 'not the same'} setting for all models."]


def cuts(rows: Sequence[Row]) -> Iterable[str]:
    cells = by([row for row in rows if row["kind"] == "cell"], "cuts", "method", "questions")
    pairs = list(dict.fromkeys((n, method) for n, method, _ in cells))
    head = ["cuts", "method", "n", *QUESTIONS, *(f"against full, {each}" for each in QUESTIONS)]
    lines = []
    for n, method in pairs:
        of = [cells[n, method, each] for each in QUESTIONS]
        gaps = ["—"] * len(of) if method == "full" else [signed(row, "delta") for row in of]
        lines.append([str(n), f"`{method}`", counted(of[0]), *(shown(row, "accuracy") for row in of), *gaps])
    yield f"{rows[0]['length']} frames:\n\n" + table(head, lines)
    said = []
    for row in rows:
        if row["kind"] != "effect" or row["questions"] != "all":
            continue
        cell = cells[row["to"], row["method"], "all"]
        said.append(
            sentence(
                judged(cell, _no_worse(row)),
                f"`{row['method']}` loses no more against full attention with {row['to']} cuts than with {row['from']}: the "
                f"difference changes by {signed(row, 'effect')} (less than {MARGIN:.2f} worse counts as none).",
            )
        )
    yield "\n".join(said)


def _no_worse(row: Row) -> Verdict:
    if row["effect"] is None:
        return Verdict.MISSING
    if row["effect_low"] > -MARGIN:
        return Verdict.HELD
    return Verdict.FAILED if row["effect_high"] < 0 else Verdict.OPEN


def better(rows: Sequence[Row]) -> Iterable[str]:
    for length in lengths_of(rows):
        groups = [row for row in rows if row["kind"] == "group" and row["length"] == length]
        head = ["questions", "n", "both right", "only PEVLM", "only full", "PEVLM minus full", "p"]
        lines = [
            [
                row["type"],
                *(str(row[name]) for name in ("n", "both", "only_own", "only_full")),
                signed(row, "delta"),
                number(row["p"], ".3f"),
            ]
            for row in groups
        ]
        yield f"{length} frames (p: McNemar's exact test, videos kept together):\n\n" + table(head, lines)
        yield "\n".join(_better(groups, length))
    examples = [row for row in rows if row["kind"] == "example"]
    if examples:
        yield "Questions that only PEVLM answered rightly (the first of each length):"
        head = ["sample", "question", "answer", "PEVLM", "full"]
        yield table(head, [[row[key] for key in ("id", "question", "answer", "own", "full")] for row in examples])


def _better(groups: Sequence[Row], length: int) -> Iterable[str]:
    whole = next(row for row in groups if row["type"] == "all")
    level = 0.05 / len(groups)
    won = [row for row in groups if row["p"] is not None and row["p"] < level and row["only_own"] > row["only_full"]]
    named = ", ".join(row["type"] for row in won) or "none"
    worse = above(whole, "delta") is Verdict.FAILED and all(row["only_own"] <= row["only_full"] for row in groups)
    verdict = Verdict.HELD if won else Verdict.FAILED if worse else Verdict.OPEN
    yield sentence(
        verdict,
        f"at {length} frames PEVLM is better than full attention on some of {len(groups)} groups of questions beyond the "
        f"error (p < 0.05/{len(groups)}): {named}. It alone is right on {whole['only_own']} of {whole['n']} questions, full "
        f"attention alone on {whole['only_full']}.",
    )
    lost = whole["only_full"] - whole["only_own"]
    order = next((row for row in groups if row["type"] == "order"), None)
    if lost > 0 and order is not None:
        yield f"- Of a net loss of {lost} questions, {order['only_full'] - order['only_own']} are order questions."
