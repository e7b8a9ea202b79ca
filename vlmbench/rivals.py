"""Which trivial methods a table lacks at a method's own budget, and what to type to get them."""

from __future__ import annotations

from collections.abc import Sequence

from vlmbench.budget import TRIVIAL, Spent, matched, rivals
from vlmbench.loaded import BASELINE, Loaded

REFERENCES = ("full", "blind", "prior")
"""Rows that say what a number means; they are not held against the trivial methods."""
NEAR = 0.9
"""Share of a budget that a trivial method must use to be at that budget."""


def missing(runs: Sequence[Loaded]) -> list[str]:
    """A line for each model and suite where a method has no `TRIVIAL` rival that spends as much as it does."""
    groups: dict[str, list[Loaded]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return [line for group in groups.values() if (line := _line(group))]


def _line(group: Sequence[Loaded]) -> str:
    full = next((run for run in group if run.method == BASELINE and run.spent), None)
    if full is None or full.spent is None or full.mixed:
        return ""  # one number of tokens is no budget for videos of several lengths
    wanted: dict[str, None] = {}
    alone: dict[str, None] = {}
    for run in group:
        specs = _missing(run, full.spent, full.frames, group)
        wanted |= dict.fromkeys(specs)
        alone |= dict.fromkeys([run.method] if specs else [])
    if not wanted:
        return ""
    options = " ".join(f"--method {spec}" for spec in wanted)
    return (
        f"{full.spec['model']} on {full.suite}: not every trivial method was asked at the budget of {', '.join(alone)}; "
        f"the same command with {options} adds them"
    )


def _missing(run: Loaded, full: Spent, frames: int | None, group: Sequence[Loaded]) -> list[str]:
    if run.spent is None or run.method in (*TRIVIAL, *REFERENCES):
        return []
    found = []
    for spec, tokens in rivals(matched(run.spent, full), full, frames).items():
        there = [each.spent for each in group if spec.startswith(f"{each.method}:") and each.spent]
        if not any(each.within(run.spent) and each.tokens >= NEAR * tokens for each in there):
            found.append(spec)
    return found
