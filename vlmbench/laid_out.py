"""A table as papers print it: columns, bands of lines, a footnote. What is best in a band is marked only when it is proved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from vlmbench import stats
from vlmbench.loaded import Loaded
from vlmbench.report import paired_ratio

Kind = Literal["text", "accuracy", "average", "speed", "exact", "plain"]
"""How two cells are compared: by paired answers, by paired rounds, by what is shown (counts have no error), or not."""


@dataclass(frozen=True)
class Column:
    """One figure; `key` names it for programs, which get it unscaled."""

    key: str
    head: str
    group: str = ""
    """Columns beside each other with one group stand under one heading."""
    scale: float = 1.0
    """What is shown is the value times this."""
    form: str = ".3g"
    kind: Kind = "plain"
    better: Literal[-1, 1] = 1
    """1: the larger is the better one."""
    place: str = ""
    """Which of a line's runs the figure is of; empty for a line of one run, or for a mean over all."""
    span: str = ""
    """For `speed`: the span that is compared."""

    def shown(self, cell: Cell) -> str:
        if cell.oom:
            return "OOM"
        if cell.value is None:
            return NOTHING
        text = format(cell.value * self.scale, self.form)
        return text if cell.coverage is None else f"{text} ({cell.coverage:.0%} done)"


NOTHING = "—"


@dataclass(frozen=True)
class Cell:
    value: float | None = None
    low: float | None = None
    high: float | None = None
    oom: bool = False
    coverage: float | None = None
    """Share of the samples that finished, when not all of them did."""


@dataclass
class Line:
    """One method with its figures."""

    method: str
    params: str
    runs: Mapping[str, Loaded]
    """Place -> run, see `Column.place`."""
    cells: Mapping[str, Cell]
    marks: Sequence[str] = ()
    reference: bool = False
    """Full attention, what the others are held against."""
    ranked: bool = True
    """Whether it competes for being best; rows that only say what a number means do not."""
    trained: bool = False
    best: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)


@dataclass
class Band:
    title: str
    lines: list[Line]


@dataclass
class Table:
    """One table of a layout."""

    layout: str
    title: str
    columns: list[Column]
    bands: list[Band]
    notes: list[str]
    split: str = ""
    """``field=value`` when this is one of several."""

    def __post_init__(self) -> None:
        """Leaves out columns that are empty everywhere, and marks."""
        lines = [line for band in self.bands for line in band.lines]
        self.columns = [
            column
            for column in self.columns
            if any(line.cells[column.key].value is not None or line.cells[column.key].oom for line in lines)
        ]
        for band in self.bands:
            _mark(band, self.columns)


def _mark(band: Band, columns: Sequence[Column]) -> None:
    """Best of a band, and second best, each only when it beats the next one by more than the error of the difference."""
    for column in columns:
        known = [line for line in band.lines if line.cells[column.key].value is not None and _competes(line, column)]
        order = sorted(known, key=lambda line: column.better * _value(line, column), reverse=True)
        if len(order) < 2 or column.kind in ("text", "plain") or not _beats(order[0], order[1], column):
            continue
        order[0].best.append(column.key)
        if len(order) > 2 and _beats(order[1], order[2], column):
            order[1].second.append(column.key)


def _competes(line: Line, column: Column) -> bool:
    """The time of a method that computes the dense amount and masks says nothing about it."""
    return line.ranked and not (column.kind == "speed" and "masked" in line.marks)


def _value(line: Line, column: Column) -> float:
    value = line.cells[column.key].value
    return -column.better * math.inf if value is None else value


def _beats(one: Line, other: Line, column: Column) -> bool:
    """Whether the better of two lines is so beyond the error."""
    if column.kind == "exact":
        return column.shown(one.cells[column.key]) != column.shown(other.cells[column.key])
    if column.kind == "average":
        return _average_beats(one, other, sorted(one.runs.keys() & other.runs.keys()))
    place = column.place or next(iter(one.runs), "")
    if place not in one.runs or place not in other.runs or (not column.place and len(one.runs) > 1):
        return False
    delta = _gap(one.runs[place], other.runs[place])
    if column.kind == "accuracy":
        return delta is not None and delta.low is not None and delta.low > 0
    return _faster(one.runs[place], other.runs[place], column.span)


def _gap(one: Loaded, other: Loaded) -> stats.Estimate | None:
    ids = sorted(one.scores.keys() & other.scores.keys())
    clusters = [one.accuracy[id_].cluster for id_ in ids]
    return stats.paired_delta([one.scores[id_] for id_ in ids], [other.scores[id_] for id_ in ids], clusters)


def _average_beats(one: Line, other: Line, places: Sequence[str]) -> bool:
    """Suites are independent, so the squares of the errors add up; full attention's scores are taken as they are."""
    total = square = 0.0
    for place in places:
        gap, dense = _gap(one.runs[place], other.runs[place]), one.cells[f"full:{place}"].value
        if gap is None or gap.low is None or not dense:
            return False
        total += gap.value / dense
        square += ((gap.value - gap.low) / dense) ** 2
    return bool(places) and total > math.sqrt(square)


def _faster(one: Loaded, other: Loaded, span: str) -> bool:
    """Of rounds taken in turns in one session; of others nothing is claimed."""
    pairs = [(one.latency[id_], other.latency[id_]) for id_ in sorted(one.latency.keys() & other.latency.keys())]
    ratios = [
        (paired_ratio(theirs.rounds, own.rounds, span), own.cluster)
        for own, theirs in pairs
        if own.session == theirs.session
    ]
    known = [(ratio, cluster) for ratio, cluster in ratios if ratio is not None]
    found = stats.ratio_interval([ratio for ratio, _ in known], [cluster for _, cluster in known])
    return found is not None and found.low is not None and found.low > 1


def mean_cell(cells: Sequence[Cell]) -> Cell:
    """The one cell, or the mean over several places; nothing when a place has nothing."""
    if len(cells) == 1:
        return cells[0]
    values = [cell.value for cell in cells]
    known = [value for value in values if value is not None]
    if any(cell.oom for cell in cells):
        return Cell(oom=True)
    return Cell(fmean(known)) if known and len(known) == len(values) else Cell()
