"""From stored runs to the lines and bands of a layout: one line a method, its cells, and what stands above it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlmbench.laid_out import Band, Cell, Column, Line, mean_cell
from vlmbench.loaded import BASELINE, Loaded
from vlmbench.record import Pass
from vlmbench.report import REFERENCES
from vlmbench.spec import joined

Pair = tuple[Loaded, Mapping[str, Any]]
"""A run and its row in the plain table."""
_MARKED = ("below-trivial", "masked", "inactive>10%")
"""Marks that stand beside a method's name; the others hold for whole tables."""


def method_name(run: Loaded) -> str:
    return joined(run.method, run.params)


def methods(
    pairs: Iterable[Pair], place: Callable[[Loaded], str] = lambda run: run.suite
) -> list[list[tuple[str, Loaded, Any]]]:
    """(place, run, row) of every method, full attention first."""
    found: dict[str, list[tuple[str, Loaded, Any]]] = {}
    for run, row in pairs:
        found.setdefault(method_name(run), []).append((place(run), run, row))
    return sorted(found.values(), key=lambda runs: runs[0][1].method != BASELINE)


def line(
    runs: Sequence[tuple[str, Loaded, Mapping[str, Any]]], columns: Sequence[Column], places: int | None = None
) -> Line:
    """One method's figures. A mean is over all of `places`: without one of them there is none."""
    cells: dict[str, Cell] = {}
    for column in columns:
        own = [_cell(run, row, column.key.partition(":")[0]) for place, run, row in runs if column.place in ("", place)]
        whole = column.place or places in (None, len(own))
        cells[column.key] = mean_cell(own) if own and whole else Cell()
    for place, _, row in runs:
        cells[f"full:{place}"] = Cell(row["full"]["accuracy"] if row["full"] else None)
    cells["retained"] = mean_cell([_cell(run, row, "retained") for _, run, row in runs])
    _, run, _ = runs[0]
    marks = [mark for mark in _MARKED if any(mark in row["marks"] for _, _, row in runs)]
    by_place = {place: each for place, each, _ in runs}
    trained = any("trained" in row["marks"] for _, _, row in runs)
    return Line(
        run.method, run.params, by_place, cells, marks, run.method == BASELINE, run.method not in REFERENCES, trained
    )


def _cell(run: Loaded, row: Mapping[str, Any], name: str) -> Cell:
    """One figure of a run; the shares are of full attention's on the same work."""
    full = row["full"]
    if name in ("flops_share", "retained", "accuracy_share"):
        source = {"flops_share": "flops", "retained": "n_visual_tokens", "accuracy_share": "accuracy"}[name]
        own, dense = row[source], full[source] if full else None
        return Cell(own / dense) if own is not None and dense else Cell()
    if name == "tokens_per_s":
        seconds = row["decode_s_per_token"]
        return Cell(1 / seconds) if seconds else Cell(oom=_ran_out(run, name))
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if value is None:
        return Cell(oom=_ran_out(run, name))
    if name == "accuracy":
        statuses = {each.status for each in run.accuracy.values()}
        if statuses == {"oom"}:
            return Cell(oom=True)
        coverage = len(run.finished) / len(run.accuracy) if len(run.finished) < len(run.accuracy) else None
        return Cell(value, low, high, coverage=coverage)
    return Cell(value, low, high)


def _ran_out(run: Loaded, name: str) -> bool:
    pass_: Pass = "memory" if name.endswith("_bytes") else "latency"
    return name not in ("accuracy", "flops", "n_visual_tokens") and any(
        each.status == "oom" for each in run.view.records.of(pass_).values()
    )


def by_retention(lines: Sequence[Line]) -> list[Band]:
    """Full attention, then bands from most to fewest visual tokens, those of trained methods beside them."""
    bands = [Band(_title(line, upper=True), [line]) for line in lines if line.reference]
    keyed: dict[tuple[float, bool], list[Line]] = {}
    for line in lines:
        if not line.reference:
            share = line.cells["retained"].value
            keyed.setdefault((-1.0 if share is None else round(share, 2), line.trained), []).append(line)
    both = any(trained for _, trained in keyed)
    for (_, trained), own in sorted(keyed.items(), key=lambda item: (-item[0][0], item[0][1])):
        kind = f", {'trained' if trained else 'training-free'}" if both else ""
        bands.append(Band(_title(own[0]) + kind, own))
    return bands


def _title(line: Line, upper: bool = False) -> str:
    counts = {run.n_visual_tokens for run in line.runs.values() if run.n_visual_tokens is not None}
    tokens = f"{counts.pop():.0f} visual tokens" if len(counts) == 1 else "visual tokens"
    share = line.cells["retained"].value
    if upper:
        return f"Full attention, {tokens} (100 %)"
    if share is None:
        return f"{tokens[:1].upper()}{tokens[1:]}"
    if round(share, 2) == 1:
        return f"All {tokens}"
    if share == 0:
        return "No visual tokens"
    return f"Retain {tokens} ({100 * share:.0f} %, ↓ {100 * (1 - share):.0f} %)"


def by_training(lines: Sequence[Line], title: str) -> list[Band]:
    bands = []
    for trained in (False, True):
        own = [line for line in lines if line.trained == trained]
        if own:
            bands.append(Band("Trained methods" if trained else title, own))
    return bands
