"""How the verdicts of a gate are written: Markdown for a pull request, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlmbench import plain
from vlmbench.gate import WIDE, Judged, Verdict, overall
from vlmbench.record import SCHEMA
from vlmbench.tables import method_text

_SAID: dict[Verdict, str] = {"pass": "passed", "fail": "regressed", "inconclusive": "inconclusive"}
_SHOWN = {
    "vision": "vision ×",
    "prefill": "prefill ×",
    "ttft": "first token ×",
    "decode": "decode ×",
    "e2e": "end to end ×",
}


def to_markdown(judged: Sequence[Judged], said: Sequence[str]) -> str:
    """A summary for a pull request."""
    lines = [f"### vlmbench gate: {_SAID[overall(judged)]}", ""]
    if judged:
        lines += ["| method | what | floor | measured | verdict |", "| --- | --- | ---: | ---: | --- |"]
    for each in judged:
        form, unit = ("+z.3f", "") if each.metric == "accuracy_delta" else (".2f", "×")
        what = "accuracy against full" if unit == "" else _SHOWN[each.metric.removeprefix("speedup_")]
        value, low, high = each.estimate
        shown = f"{value:{form}}{unit}" + ("" if low is None else f" [{low:{form}}, {high:{form}}]")
        name = method_text(each.key._asdict())
        marked = {"pass": "pass", "fail": "**fail**", "inconclusive": "inconclusive"}[each.verdict]
        lines.append(f"| {name} | {what} | {each.floor:{form}}{unit} | {shown} | {marked} |")
    below = list(said)
    if judged:
        below.append(
            "a floor fails only when the whole 95 % interval is below it; × is against full attention in turns"
        )
    below += [
        f"{method_text(each.key._asdict())}: a loss of less than {each.detectable:.3f} may pass unseen; so many questions "
        "show no smaller one in four of five cases (`--limit`)"
        for each in judged
        if each.verdict == "pass" and each.detectable is not None and each.detectable > max(-each.floor, 0.0)
    ]
    if any(each.verdict == "inconclusive" for each in judged):
        below.append(
            f"inconclusive: the floor is inside an interval whose half-width is above {WIDE:.0%}, or there is no "
            "interval; times need more videos (`run --timed`) or rounds (`--repeats`, with --fresh), accuracies more "
            "questions (`--limit`)"
        )
    return "\n".join([*lines, *([""] if judged else []), *(f"- {plain.note(each)}" for each in below)]) + "\n"


def to_json(judged: Sequence[Judged], said: Sequence[str]) -> str:
    """``{"schema": 1, "verdict", "notes", "rows": […]}``, see docs/schema/gate.schema.json."""
    rows = [
        {
            **each.key._asdict(),
            "metric": each.metric,
            "floor": each.floor,
            "given": each.given,
            "value": each.estimate.value,
            "low": each.estimate.low,
            "high": each.estimate.high,
            "mcnemar_p": each.p,
            "detectable_delta": each.detectable,
            "verdict": each.verdict,
        }
        for each in judged
    ]
    data = {"schema": SCHEMA, "verdict": overall(judged), "notes": list(said), "rows": rows}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"
