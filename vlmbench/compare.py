"""`vlmbench compare A B`: the paired difference of two stored runs on the samples that both hold.

Everything is B against A: a difference is B − A, a speed-up above 1 says that B is faster. Unlike a table's, the two may
differ in anything but the questions; what they differ in stands below, since it is part of the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vlmbench import significance, stats
from vlmbench.errors import UsageError
from vlmbench.explain import explain
from vlmbench.fidelity import fidelity
from vlmbench.loaded import Loaded
from vlmbench.plain import cell
from vlmbench.record import SCHEMA
from vlmbench.report import paired_ratio, span_seconds
from vlmbench.tables import SPANS, p_text

Row = dict[str, Any]

SHOWN = {
    "accuracy": "accuracy",
    "accuracy_bootstrap": "accuracy, by bootstrap",
    "mcnemar_p": "p of McNemar's test",
    "detectable_delta": "least difference that shows in four of five cases",
    "only_a": "right in A alone",
    "only_b": "right in B alone",
    "agreement": "same answer",
    "first_token_match": "same first token",
    "first_token_kl": "KL of the first token, nats",
    "greedy_prefix": "tokens before the first that differs",
    "peak_bytes": "peak, GiB",
    "kv_bytes": "KV, MiB",
    **{f"speedup_{span}": f"{span}, s" for span in SPANS},
}
IN_TURNS, APART = "in turns", "measured apart: the machine may have changed"


def compare(a: Loaded, b: Loaded) -> list[Row]:
    """Rows of quantity, a, b, kind, value, low, high, n, note. Raises `UsageError` when no sample is in both."""
    if a.spec["suite"] != b.spec["suite"]:
        raise UsageError(
            f"A is on {a.suite} and B on {b.suite}: other questions cannot be paired; name two runs on one suite."
        )
    rows = [*_accuracy(a, b), *_times(a, b), *_memory(a, b)]
    if not rows:
        raise UsageError(
            f"{a.view.folder} and {b.view.folder} hold no sample in common{_damaged(a, b)}; run both with the same --limit."
        )
    return rows


def _damaged(*runs: Loaded) -> str:
    lines = sum(len(run.view.records.damaged) for run in runs)
    return f" ({lines} damaged lines are left out)" if lines else ""


def _row(quantity: str, kind: str, value: float | None, n: int, **more: Any) -> Row:
    empty = dict.fromkeys(("a", "b", "low", "high"))
    return {"quantity": quantity, "kind": kind, "value": value, "n": n, "note": "", **empty, **more}


def _accuracy(a: Loaded, b: Loaded) -> list[Row]:
    """Over samples that both were asked, unfinished ones wrong; fidelity over those that both finished."""
    ids = sorted(a.scores.keys() & b.scores.keys())
    rows = []
    if ids:
        own, other = ([run.scores[id_] for id_ in ids] for run in (b, a))
        paired = (own, other, [b.accuracy[id_].cluster for id_ in ids])
        n, means = len(ids), {"a": sum(other) / len(ids), "b": sum(own) / len(ids)}
        for name, estimate in (
            ("accuracy", stats.paired_delta(*paired)),
            ("accuracy_bootstrap", significance.paired_bootstrap(*paired)),
        ):
            if estimate is not None:
                rows.append(_row(name, "difference", estimate.value, n, low=estimate.low, high=estimate.high, **means))
        rows += [
            _row("mcnemar_p", "test", significance.mcnemar(*paired), n),
            _row("detectable_delta", "test", significance.detectable(*paired), n),
            _row("only_a", "count", sum(x < y for x, y in zip(own, other, strict=True)), n),
            _row("only_b", "count", sum(x > y for x, y in zip(own, other, strict=True)), n),
        ]
    both = sorted(a.finished & b.finished)
    near = fidelity([(b.accuracy[id_], a.accuracy[id_]) for id_ in both])
    return rows + [_row(name, "fidelity", value, len(both)) for name, value in near.items()]


def _times(a: Loaded, b: Loaded) -> list[Row]:
    """Of rounds taken in turns where one session timed both, else of each sample's medians."""
    ids = sorted(a.latency.keys() & b.latency.keys())
    if not ids:
        return []
    pairs = [(a.latency[id_], b.latency[id_]) for id_ in ids]
    together = all(one.session and one.session == other.session for one, other in pairs)
    rows = []
    for span in SPANS:
        known = []
        for one, other in pairs:
            sides = [each.rounds if together else [each.timing] if each.timing else [] for each in (one, other)]
            ratio = paired_ratio(sides[0], sides[1], span)
            if ratio is not None:
                known.append((ratio, other.cluster))
        found = stats.ratio_interval([ratio for ratio, _ in known], [cluster for _, cluster in known])
        if found is None:
            continue
        seconds = [
            median(span_seconds(each.timing, span) for each in side if each.timing) for side in zip(*pairs, strict=True)
        ]
        more = {"a": seconds[0], "b": seconds[1], "note": IN_TURNS if together else APART}
        rows.append(_row(f"speedup_{span}", "ratio", found.value, len(known), low=found.low, high=found.high, **more))
    return rows


def _memory(a: Loaded, b: Loaded) -> list[Row]:
    """Bytes have no error: the same samples give the same counts."""
    passes = [run.view.records.of("memory") for run in (a, b)]
    both = [id_ for id_ in sorted(passes[0].keys() & passes[1].keys()) if all(each[id_].memory for each in passes)]
    rows = []
    for name, of in (("peak_bytes", max), ("kv_bytes", median)):
        first, second = (of(getattr(each[id_].memory, name) for id_ in both) if both else None for each in passes)
        if first is not None and second is not None:
            rows.append(_row(name, "share", second / first if first else None, len(both), a=first, b=second))
    return rows


def warnings(a: Loaded, b: Loaded) -> list[str]:
    """What makes the pairs doubtful: other questions or files under the same ids."""
    differ = {row["field"] for row in explain(a, b)}
    other = [name for name in ("suite_version", "suite_hash") if name in differ]
    return [f"the same id may be another question (another {' and '.join(other)}): run one of them again"] * bool(other)


def to_json(rows: Sequence[Mapping[str, Any]], a: Loaded, b: Loaded) -> str:
    """``{"schema": 1, "rows": […], "warnings": […]}``"""
    return json.dumps({"schema": SCHEMA, "rows": list(rows), "warnings": warnings(a, b)}, indent=1) + "\n"


def to_markdown(rows: Sequence[Mapping[str, Any]], a: Loaded, b: Loaded) -> str:
    lines = ["| B against A | A | B | | n |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        name = SHOWN[row["quantity"]] + (f" ({row['note']})" if row["note"] else "")
        scale = {"peak_bytes": 2**30, "kv_bytes": 2**20}.get(row["quantity"], 1)
        own = ["" if row[side] is None else f"{row[side] / scale:.3g}" for side in ("a", "b")]
        lines.append(f"| {' | '.join([name, *own, _shown(row), str(row['n'])])} |")
    lines += ["", f"- A: {cell(a.view.folder)}", f"- B: {cell(b.view.folder)}"]
    differ = [row["field"] for row in explain(a, b) if row["changes"] != "time" or row["field"] in ("card", "threads")]
    said = f"differ in {', '.join(differ)}" if differ else "differ in nothing that can change answers"
    lines.append(f"- A and B {said}; `vlmbench explain A B` says what that does")
    lines += [f"- **{each}**" for each in warnings(a, b)]
    lines.append("- differences are B − A; × above 1: B is faster; brackets are 95 % intervals clustered by video")
    return "\n".join(lines) + "\n"


def _shown(row: Mapping[str, Any]) -> str:
    value, low, high = row["value"], row["low"], row["high"]
    if value is None:
        return "—"
    if row["quantity"] == "mcnemar_p":
        return p_text(value)
    form, unit = {
        "difference": ("+z.3f", ""),
        "ratio": (".2f", "×"),
        "share": (".2f", " of A's"),
        "count": ("d", ""),
    }.get(row["kind"], (".3g", ""))
    return f"{value:{form}}{unit}" + ("" if low is None else f" [{low:{form}}, {high:{form}}]")
