"""What stands below a laid out table, made from the headers and records: what the figures are, on what, with which versions."""

from __future__ import annotations

from collections.abc import Sequence

from vlmbench.laid_lines import Pair
from vlmbench.laid_out import Column
from vlmbench.loaded import Loaded
from vlmbench.report import REFERENCES
from vlmbench.tables import MARKS, idle_text, setting_text, timed_text, versions_text, wrote
from vlmbench.work import FORMULA


def notes(pairs: Sequence[Pair], columns: Sequence[Column]) -> list[str]:
    """From the headers and records: what the figures are, on what, with which versions."""
    runs = [run for run, _ in pairs]
    views = [run.view for run in runs]
    keys = {column.key.partition(":")[0] for column in columns}
    said = []
    if keys & {"accuracy", "accuracy_share"}:
        counts = sorted({len(run.accuracy) for run in runs if run.accuracy})
        said.append(f"accuracy: {span_text(counts)} questions each suite, unfinished ones wrong")
    if any(key.startswith("speedup") for key in keys):
        said.append(
            "×: over full attention with the best dense kernel, above 1 is faster, median of paired ratios of rounds in turns"
        )
    said.append(
        "bold: best of a band, underlined: second best, each only where the difference to the next exceeds its 95 % error "
        f"(clustered by video; times: paired rounds); {', '.join(REFERENCES)} are not ranked"
    )
    if keys & {"flops", "flops_share"}:
        said.append(f"FLOPs: {FORMULA}")
    used = {mark for _, row in pairs for mark in row["marks"]}
    said += [f"{mark}: {text}" for mark, text in MARKS.items() if mark in used]
    sessions = [(run.header, session) for run in runs for session in wrote(run.view)]
    said += dict.fromkeys(setting_text(header, session) for header, session in sessions)
    said.append(f"batch 1; {_pixels(runs)}")
    said += filter(None, [timed_text(views)])
    said += dict.fromkeys(versions_text(session) for _, session in sessions)
    said += filter(None, map(idle_text, views))
    for run in runs:
        if run.header["status"] != "done":
            said.append(f"{run.view.folder.name}: not complete ({run.header['status']})")
    return said


def _pixels(runs: Sequence[Loaded]) -> str:
    sizes = sorted({each.size for run in runs for each in run.samples.values() if each.size})
    shown = ", ".join(f"{width} × {height}" for height, width in sizes[:3]) + (", …" if len(sizes) > 3 else "")
    limits = {(run.spec["min_pixels"], run.spec["max_pixels"]) for run in runs}
    budgets = "; ".join(
        "the model's own pixel budget"
        if pair == (None, None)
        else f"pixels from {pair[0] or 'the least'} to {pair[1] or 'any'}"
        for pair in sorted(limits, key=str)
    )
    return f"decoded frames of {shown} pixels, {budgets}" if shown else budgets


def span_text(values: Sequence[int]) -> str:
    """``66`` or ``60 to 66``."""
    return "no" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
