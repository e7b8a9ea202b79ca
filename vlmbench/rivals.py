"""Which trivial methods a table lacks at a method's own budget, and what to type to get them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlmbench.budget import TRIVIAL, Spent, matched, rivals
from vlmbench.loaded import BASELINE, Loaded
from vlmbench.registry import methods
from vlmbench.spec import build, params_of, parse

REFERENCES = ("full", "blind", "prior")
"""Rows that say what a number means; they are not held against the trivial methods."""
NEAR = 0.9
"""Share of a budget that a trivial method must use to be at that budget."""


class Gap(NamedTuple):
    """A model and suite where methods lack `TRIVIAL` rivals that spend as much as they do."""

    full: Loaded
    methods: tuple[str, ...]
    rivals: tuple[str, ...]
    """As typed behind ``--method``."""


def missing(runs: Sequence[Loaded]) -> list[str]:
    """A line for each gap, with what to type; and for each suite of several lengths, where there is nothing to type."""
    lines = [
        f"{gap.full.spec['model']} on {gap.full.suite}: not every trivial method was asked at the budget of "
        f"{', '.join(gap.methods)}; the same command with --trivial adds them, or with "
        f"{' '.join(f'--method {spec}' for spec in gap.rivals)}"
        for gap in _gaps(runs)
    ]
    return lines + [line for group in _groups(runs) if (line := _no_budget(group))]


def wanted(runs: Sequence[Loaded]) -> tuple[str, ...]:
    """The rivals that `runs` lack, each once."""
    return tuple(dict.fromkeys(spec for gap in _gaps(runs) for spec in gap.rivals))


def _gaps(runs: Sequence[Loaded]) -> list[Gap]:
    return [gap for group in _groups(runs) if (gap := _gap(group)) is not None]


def _groups(runs: Sequence[Loaded]) -> list[list[Loaded]]:
    groups: dict[str, list[Loaded]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return [*groups.values()]


def _no_budget(group: Sequence[Loaded]) -> str:
    """Of videos of several lengths: one number of tokens is no budget, and what one share costs differs with the length."""
    full = next((run for run in group if run.method == BASELINE and run.mixed and run.spent), None)
    dense = full.spent if full else None
    if full is None or dense is None:
        return ""
    less = [
        run
        for run in group
        if run.method not in (*TRIVIAL, *REFERENCES) and run.spent and run.spent.flops < dense.flops
    ]
    trivial = [run.spent for run in group if run.method in TRIVIAL and run.spent]
    alone = dict.fromkeys(
        run.method for run in less if run.spent and not any(each.within(run.spent) for each in trivial)
    )
    if not alone:
        return ""
    return (
        f"{full.spec['model']} on {full.suite}: its videos have several lengths, and so no one budget of tokens: no trivial "
        f"method was asked at the budget of {', '.join(alone)}; on a suite of one length the table says which to ask"
    )


def _gap(group: Sequence[Loaded]) -> Gap | None:
    full = next((run for run in group if run.method == BASELINE and run.spent), None)
    if full is None or full.spent is None or full.mixed:
        return None  # one number of tokens is no budget for videos of several lengths
    lacking = {run.method: specs for run in group if (specs := _missing(run, full.spent, _frames(full), group))}
    found = dict.fromkeys(spec for specs in lacking.values() for spec in specs)
    return Gap(full, tuple(lacking), tuple(found)) if found else None


def _frames(full: Loaded) -> int | None:
    """That were decoded: of pictures one, whatever was asked for."""
    return next((len(each.frames) for each in full.samples.values() if each.frames), full.frames)


def _missing(run: Loaded, full: Spent, frames: int | None, group: Sequence[Loaded]) -> list[str]:
    if run.spent is None or run.method in (*TRIVIAL, *REFERENCES):
        return []
    found = []
    for spec, tokens in rivals(matched(run.spent, full), full, frames).items():
        asked = [each for each in group if spec.startswith(f"{each.method}:") and each.spent]
        near = (each.spent for each in asked if each.spent and each.spent.within(run.spent))
        if not any(each.tokens >= NEAR * tokens for each in near) and not any(_is(each, spec) for each in asked):
            found.append(spec)
    return found


def _is(run: Loaded, spec: str) -> bool:
    """Whether this very rival was asked. Where pictures differ in size, or a Qwen-VL pairs an odd number of frames, it keeps
    fewer tokens than it may, and there is none nearer."""
    wanted = parse(spec)
    return params_of(build(methods.load(wanted.name), wanted, "Method")) == dict(run.spec["method_params"])
