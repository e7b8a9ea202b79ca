"""From an estimate and its interval to a verdict in words. No sentence about a claim is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from vlmbench.loaded import INACTIVE_LIMIT

Row = Mapping[str, Any]


class Verdict(StrEnum):
    HELD = "Held"
    FAILED = "Did not hold"
    OPEN = "Open"
    """The interval holds both, or there is none."""
    IDLE = "Not judged"
    """The method had nothing to do on too many questions."""
    MISSING = "Not measured"


def above(row: Row, name: str, least: float = 0.0) -> Verdict:
    """Whether the whole interval of `name` lies above `least` (held) or below it (did not hold)."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if row[name] is None:
        return Verdict.MISSING
    if low is None or high is None:
        return Verdict.OPEN
    return Verdict.HELD if low > least else Verdict.FAILED if high < least else Verdict.OPEN


def near(row: Row, name: str, loss: float, worst: float) -> Verdict:
    """Whether at most `loss` is lost and the interval's lower end is above −`worst`; denied by an interval below −`loss`."""
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    if value is None:
        return Verdict.MISSING
    if low is None or high is None:
        return Verdict.OPEN
    if value >= -loss and low > -worst:
        return Verdict.HELD
    return Verdict.FAILED if high < -loss else Verdict.OPEN


def idle(row: Row) -> bool:
    """Whether the method equalled full attention on more than a tenth of the questions."""
    return bool(row["n_inactive"] > INACTIVE_LIMIT * row["n"])


def judged(row: Row, verdict: Verdict) -> Verdict:
    return Verdict.IDLE if idle(row) else verdict


def direction(row: Row, name: str) -> str:
    """In words: a gain, a loss, or neither beyond the error."""
    return {
        Verdict.HELD: "a gain",
        Verdict.FAILED: "a loss",
        Verdict.OPEN: "neither gain nor loss beyond the error",
        Verdict.MISSING: "not measured",
    }[above(row, name)]


def shown(row: Row, name: str, form: str = ".2f", unit: str = "") -> str:
    """``value [low, high]``; the value alone without an interval, and — without a value."""
    return _interval(row, name, lambda value: f"{value:{form}}", unit)


def signed(row: Row, name: str) -> str:
    """The same with signs. What rounding would make 0 keeps its side and one digit: an interval below 0 ends below 0."""
    return _interval(row, name, lambda value: f"{value:+.1g}" if 0 < abs(value) < 0.005 else f"{value:+z.2f}")


def _interval(row: Row, name: str, written: Callable[[float], str], unit: str = "") -> str:
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    if value is None:
        return "—"
    return written(value) + unit + ("" if low is None or high is None else f" [{written(low)}, {written(high)}]")


def number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def counted(row: Row) -> str:
    """n, and how many failed or had nothing to do."""
    parts = [
        f"{row[name]} {word}" for name, word in (("n_failed", "failed"), ("n_inactive", "inactive")) if row.get(name)
    ]
    return f"{row['n']} ({', '.join(parts)})" if parts else str(row["n"])


def sentence(verdict: Verdict, text: str) -> str:
    """A line of a list; `text` is a whole sentence with its numbers."""
    return f"- **{verdict}**: {text}"
