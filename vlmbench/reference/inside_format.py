"""How numbers of ``reference.json`` are written in its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Model = Mapping[str, Any]


def two(row: Mapping[str, Any]) -> str:
    return f"{row['accuracy']:.2f}"


def interval(row: Mapping[str, Any] | None) -> str:
    return "—" if row is None else f"{two(row)} [{row['low']:.2f}, {row['high']:.2f}]"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def mean(values: Sequence[Sequence[float]]) -> float:
    return fmean(value for row in values for value in row)


def beyond(more: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """Layers whose interval lies above 0, and below 0."""
    known = [each for each in more if each["low"] is not None]
    return sum(each["low"] > 0 for each in known), sum(each["high"] < 0 for each in known)


def difference(each: Mapping[str, float]) -> str:
    value = f"{each['value']:+z.2f}"
    return value if each["low"] is None else f"{value} [{each['low']:+z.2f}, {each['high']:+z.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
