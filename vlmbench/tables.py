"""How a table of results is written: Markdown for people, CSV and JSON, unrounded, for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vlmbench import plain
from vlmbench.record import FINISHED, SCHEMA
from vlmbench.spec import joined
from vlmbench.work import FORMULA

if TYPE_CHECKING:
    from vlmbench.store import Run, RunView

Row = Mapping[str, Any]

SPANS = ("vision", "prefill", "ttft", "decode", "e2e")
"""Parts of a sample's time that have a speed-up; "decode" always means tokens, never video."""

COLUMNS: tuple[str, ...] = (
    *("model", "suite", "method", "params", "baseline"),
    *("n", "n_failed", "n_paired", "n_inactive", "frames", "n_visual_tokens"),
    *("accuracy", "accuracy_low", "accuracy_high"),
    *("accuracy_delta", "accuracy_delta_low", "accuracy_delta_high", "mcnemar_p", "detectable_delta"),
    *("agreement", "first_token_match", "first_token_kl", "greedy_prefix", "recall"),
    *("video_s", "preprocess_s", "vision_s", "prepare_s", "prefill_s", "ttft_s", "decode_s_per_token", "e2e_s"),
    *(f"speedup_{span}{part}" for span in SPANS for part in ("", "_low", "_high", "_same_kernel")),
    *("amdahl_prefill", "amdahl_e2e"),
    *("peak_bytes", "peak_extra_bytes", "kv_bytes", "flops"),
    *("device", "dtype", "attention_kernel", "vision_attention_kernel", "marks"),
    *("n_kept_tokens", "vision_flops", "vision_dense_flops"),
)
"""Contract §4, in its order; what came later stands behind.

A value that is not known is None: an empty cell in CSV, null in JSON, — in Markdown."""


class Rows(list[dict[str, Any]]):
    """Rows of a table, and what has to stand under it."""

    def __init__(self, rows: Iterable[dict[str, Any]] = (), notes: Sequence[str] = ()) -> None:
        super().__init__(rows)
        self.notes = tuple(notes)


def to_json(rows: Sequence[Row]) -> str:
    """``{"schema": 1, "rows": […]}`` with every column."""
    return json.dumps({"schema": SCHEMA, "rows": [dict(row) for row in rows]}, indent=1, allow_nan=False) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Every column, unrounded; `marks` are separated by blanks."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    texts = ({**row, "marks": " ".join(row["marks"])} for row in rows)
    writer.writerows({name: plain.spreadsheet(value) for name, value in row.items()} for row in texts)
    return out.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """One table for each model and suite, rounded, without empty columns; `Rows.notes` stand below."""
    parts = []
    for (model, suite), group in groupby(rows, key=lambda row: (row["model"], row["suite"])):
        parts += [f"**{plain.cell(model)}** on **{plain.cell(suite)}**", _markdown_table(list(group))]
    if not rows:
        parts.append("No results.")
    if below := getattr(rows, "notes", ()):
        parts.append("\n".join(f"- {plain.note(each)}" for each in below))
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Row]) -> str:
    lines: list[list[str]] = []
    for name, show in _READABLE:
        cells = [show(row) for row in rows]
        if len(set(cells)) > 1 if name in _WHEN_DIFFERENT else set(cells) != {NOTHING}:
            lines.append([name, "---:" if lines else "---", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*lines, strict=True))


NOTHING = "—"


def _number(row: Row, name: str, form: str, scale: float = 1.0) -> str:
    return NOTHING if row[name] is None else format(row[name] / scale if scale != 1.0 else row[name], form)


def _interval(row: Row, name: str, form: str, unit: str = "") -> str:
    """``value [low, high]``, or the value alone when there was too little data for an interval."""
    if row[name] is None:
        return NOTHING
    value, low, high = (row[name + part] for part in ("", "_low", "_high"))
    shown = f"{value:{form}}{unit}"
    return shown if low is None else f"{shown} [{low:{form}}, {high:{form}}]"


def p_text(p: float | None) -> str:
    """As papers print it: two digits, and a bound where they would say nothing."""
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def _speedup(span: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        shown = _interval(row, f"speedup_{span}", ".2f", "×")
        bound = row.get(f"amdahl_{span}")
        return shown if shown == NOTHING or bound is None else f"{shown} of at most {bound:.2f}×"

    return show


def method_text(row: Row) -> str:
    """The method as one would type it, as code in a Markdown cell."""
    return plain.code(joined(row["method"], row["params"] or ""))


def _counted(row: Row) -> str:
    parts = [f"{row[name]} {word}" for name, word in (("n_failed", "failed"), ("n_inactive", "inactive")) if row[name]]
    return f"{row['n']} ({', '.join(parts)})" if parts else str(row["n"])


def _kept(row: Row) -> str:
    """Only where layers differ, so that it says more than `visual tokens`."""
    kept, given = row.get("n_kept_tokens"), row["n_visual_tokens"]
    return NOTHING if kept is None or given is None or kept > 0.995 * given else f"{kept:.0f}"


def _tower(row: Row) -> str:
    """FLOPs of the vision tower, of methods that change it."""
    flops, dense = row.get("vision_flops"), row.get("vision_dense_flops")
    return f"{flops / dense:.2f}" if flops is not None and dense else NOTHING


_READABLE: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", method_text),
    ("device", lambda row: plain.cell(row["device"])),
    ("dtype", lambda row: plain.cell(row["dtype"])),
    ("attention", lambda row: plain.cell(row["attention_kernel"])),
    ("frames", lambda row: _number(row, "frames", "d")),
    ("n", _counted),
    ("visual tokens", lambda row: _number(row, "n_visual_tokens", ".0f")),
    ("tokens a layer", _kept),
    ("accuracy", lambda row: _interval(row, "accuracy", ".2f")),
    ("against full", lambda row: _interval(row, "accuracy_delta", "+z.2f")),
    ("p", lambda row: p_text(row["mcnemar_p"])),
    ("same answer", lambda row: _number(row, "agreement", ".2f")),
    ("same first token", lambda row: _number(row, "first_token_match", ".2f")),
    ("its KL", lambda row: _number(row, "first_token_kl", ".2g")),
    ("same prefix", lambda row: _number(row, "greedy_prefix", ".1f")),
    ("recall", lambda row: _number(row, "recall", ".2f")),
    ("vision ×", _speedup("vision")),
    ("prefill ×", _speedup("prefill")),
    ("first token ×", _speedup("ttft")),
    ("decode ×", _speedup("decode")),
    ("end to end ×", _speedup("e2e")),
    ("first token, s", lambda row: _number(row, "ttft_s", ".3g")),
    ("end to end, s", lambda row: _number(row, "e2e_s", ".3g")),
    ("peak, GiB", lambda row: _number(row, "peak_bytes", ".3g", 2**30)),
    ("KV, MiB", lambda row: _number(row, "kv_bytes", ".3g", 2**20)),
    ("prefill, GFLOPs", lambda row: _number(row, "flops", ".3g", 1e9)),
    ("tower, of full", _tower),
    ("marks", lambda row: ", ".join(row["marks"]) or NOTHING),
)
_WHEN_DIFFERENT = ("device", "dtype", "attention")
"""The notes tell these; only where rows differ do they need a column."""

MARKS = {
    "cpu": "measured on a CPU: read ratios, not seconds",
    "below-trivial": "random, uniform or downsample with no more visual tokens a layer, and no more FLOPs, is more accurate, "
    "beyond the error",
    "mixed": "videos of several lengths: frames, visual tokens and times are medians over them",
    "dequantised": "int8 weights were written out as floats at every call: it saves memory, and its time says nothing",
    "masked": "computes what it then masks, up to the dense amount; its time says nothing about the method",
    "trained": "needs training",
    "inactive>10%": "had nothing to do on more than a tenth of the samples (of joined methods: one had not), so no speed-up is "
    "given",
}


def notes(runs: Sequence[RunView | Run], rows: Sequence[Row]) -> list[str]:
    """What one has to know to read the table: how figures were made, on what, with which versions; what is missing."""
    said = []
    if any(row["accuracy"] is not None for row in rows):
        said.append(
            "accuracy counts every sample, unfinished ones as wrong; brackets are 95 % intervals clustered by video; "
            "`against full` and what follows it are over samples that both finished"
        )
    if any(row["agreement"] is not None for row in rows):
        said += [fidelity_text(rows)]
    if any(row[f"speedup_{span}"] is not None for row in rows for span in SPANS):
        said.append(
            "×: speed-up over full attention with the best dense kernel (above 1 is faster), median "
            "of paired ratios of interleaved rounds; `of at most` is Amdahl's bound; the ratio to full attention with "
            "the method's own kernel is in the CSV and JSON"
        )
    if any(row["flops"] for row in rows):
        said.append(f"FLOPs: {FORMULA}")
    used = {mark for row in rows for mark in row["marks"]}
    said += [f"{mark}: {text}" for mark, text in MARKS.items() if mark in used]
    sessions = [(run.header, session) for run in runs for session in wrote(run)]
    said += dict.fromkeys(setting_text(header, session) for header, session in sessions)
    said += filter(None, [timed_text(runs)])
    said += dict.fromkeys(versions_text(session) for _, session in sessions)
    said += filter(None, map(idle_text, runs))
    for run in runs:
        if run.header["status"] != "done":
            said.append(f"{run.folder.name}: not complete ({run.header['status']})")
        if run.records.damaged:
            said.append(f"{run.folder.name}: {len(run.records.damaged)} damaged lines are left out")
    return said


def idle_text(run: RunView | Run) -> str:
    """Of methods joined with ``+``: which of them never acted, since the row is then the others' alone."""
    method = str(run.header["spec"]["method"])
    if "+" not in method:
        return ""
    done = [record for record in run.records.values() if record.status in FINISHED]
    idle = [(record.trace or {}).get("idle") or {} for record in done]
    never = [name for name in method.split("+") if idle and all(name in each for each in idle)]
    whys = "; ".join(f"{name} had nothing to do on any sample ({idle[0][name]})" for name in never)
    return f"{method}: {whys}; the row is of what is left" if never else ""


def fidelity_text(rows: Sequence[Row]) -> str:
    """What stands between accuracy and time: the test, what it could have seen, and the nearness to full attention."""
    least = sorted(row["detectable_delta"] for row in rows if row["detectable_delta"] is not None)
    seen = (
        f"{least[0]:.2f}" + (f" to {least[-1]:.2f}" if f"{least[0]:.2f}" != f"{least[-1]:.2f}" else "") if least else ""
    )
    parts = [
        "`p`: McNemar's test against full attention, exact, by video, of each row alone" if least else "",
        f"so many samples show a difference of {seen} in four of five cases" if seen else "",
        "`KL`: of the first token, nats, at least; `same prefix`: tokens before the first that differs"
        if any(row["greedy_prefix"] is not None for row in rows)
        else "",
    ]
    return "; ".join(filter(None, parts)) or "`same answer`: share of the samples answered as by full attention"


def timed_text(runs: Sequence[RunView | Run]) -> str:
    """On how many videos the times rest, and on how many rounds and tokens of each."""
    records = [record for run in runs for record in run.records.of("latency").values() if record.timing]
    if not records:
        return ""
    videos = len({record.cluster for record in records})
    rounds = _range(len(record.rounds) for record in records)
    tokens = _range(1 + len(record.timing.decode_s) for record in records if record.timing)
    warmup = _range(session["measure"]["warmup"] for run in runs for session in wrote(run))
    return f"times: {videos} videos, {rounds} rounds after {warmup} of warm-up, {tokens} tokens decoded whatever the answer"


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def wrote(run: RunView | Run) -> list[Mapping[str, Any]]:
    """The sessions that a record is from; one that only looked at a finished run measured nothing."""
    sessions: list[Mapping[str, Any]] = run.header["sessions"]
    if len(sessions) == 1:
        return sessions
    owners = {record.session for record in run.records.values()}
    return [session for session in sessions if session["id"] in owners] or sessions[-1:]


def setting_text(header: Mapping[str, Any], session: Mapping[str, Any]) -> str:
    spec, measure, device, kernels = header["spec"], session["measure"], session["device"], session["kernels"]
    driver = f", driver {session['driver']}" if session["driver"] else ""
    return (
        f"{device['name']} ({device['type']}, {device['cpu']}, {measure['threads']} threads{driver}); "
        f"{device['dtype']}; attention {kernels['attention']}, in the vision tower {kernels['vision']}; "
        f"frames by {header['frame_rule']}; "
        f"{spec['suite']} version {spec['suite_version']}"
    )


def versions_text(session: Mapping[str, Any]) -> str:
    commit = f" at {session['commit'][:10]}{' with changes' if session['dirty'] else ''}" if session["commit"] else ""
    shown = ("python", "torch", "transformers", "triton")
    others = "".join(f", {name} {session['versions'][name]}" for name in shown if name in session["versions"])
    return f"vlmbench {session['versions']['vlmbench']}{commit}{others}"
