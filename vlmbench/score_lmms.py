"""``vlmbench score --scorer lmms-eval``: its scorer beside ours on the same texts, and every text on which they differ.

VQAv2, TextVQA and GQA score alike (`tests/lmms` tries random texts). Letters differ where lmms-eval 0.7.3 (a) takes the first
capital for the answer (of "Because y" and "B or C" we read none, of "A dog or B" we read B), (b) draws a letter when a text
has none (LongVideoBench), (c) reads no small letters ("b", "(b)") and no option's own words, and in ScienceQA nothing but "B"
and "B. ...", and (d) reads the A of "Answer: B", or what stands between think tags (LongVideoBench).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmbench.errors import UsageError
from vlmbench.lmms_client import LmmsEval
from vlmbench.score import read_texts

if TYPE_CHECKING:
    from vlmbench.suite import Suite

SAME = 1e-6
SHOWN = 60


class Difference(NamedTuple):
    id: str
    text: str
    ours: float
    ours_read: str | None
    theirs: float | None
    """None where theirs is drawn at random."""
    theirs_read: str


class Compared(NamedTuple):
    n: int
    ours: float
    theirs: float | None
    """Mean of those that are no draw; None when all are."""
    n_random: int
    differences: list[Difference]


def compare(suite: Suite, path: Path, lmms: LmmsEval | None = None) -> Compared:
    """Score the texts of `path` twice. Raises `UsageError` for a suite that lmms-eval has no task for."""
    from vlmbench.suites._official.base import OfficialSuite

    if not isinstance(suite, OfficialSuite):
        raise UsageError(f"--scorer lmms-eval knows the published suites, and {suite.name} is none of them.")
    said = read_texts(path)
    rows = suite.rows_by_id()
    samples = [sample for sample in suite.samples() if sample.id in said]
    if not samples:
        raise UsageError(f"{path} answers none of {suite.name}'s questions; name the suite that the answers are for.")
    ours_all, theirs_all, differences, drawn = [], [], [], 0
    with lmms or LmmsEval(offline=True) as opened:
        _ask(opened, "scorer", task=suite.lmms_task)
        for sample in samples:
            text = said[sample.id]
            ours = suite.score(sample, text)
            found = _ask(opened, "rate", row=_plain(rows[sample.id]), text=text)
            ours_all.append(ours.value)
            drawn += found["random"]
            if not found["random"]:
                theirs_all.append(found["value"])
            if found["random"] or abs(ours.value - found["value"]) > SAME:
                theirs = None if found["random"] else found["value"]
                differences.append(Difference(sample.id, text, *ours, theirs, found["prediction"]))
    theirs = fmean(theirs_all) if theirs_all else None
    return Compared(len(samples), fmean(ours_all), theirs, drawn, differences)


def to_rows(suite: Suite, compared: Compared) -> list[dict[str, Any]]:
    return [{"suite": suite.name, **difference._asdict()} for difference in compared.differences]


def to_text(compared: Compared) -> str:
    """The two accuracies, and a line for each difference."""
    theirs = "–" if compared.theirs is None else f"{compared.theirs:.1%}"
    drawn = f" ({compared.n_random} drawn at random left out)" if compared.n_random else ""
    lines = [
        f"ours       {compared.ours:.1%} of {compared.n}",
        f"lmms-eval  {theirs} of {compared.n - compared.n_random}{drawn}",
        f"{len(compared.differences)} differ",
    ]
    for each in compared.differences:
        read = "a random letter" if each.theirs is None else f"{each.theirs:g} ({each.theirs_read[:SHOWN]!r})"
        mine = "unread" if each.ours_read is None else repr(each.ours_read[:SHOWN])
        lines.append(f"  {each.id}: {each.text[:SHOWN]!r}: ours {each.ours:g} ({mine}), lmms-eval {read}")
    return "\n".join(lines)


def _ask(lmms: LmmsEval, op: str, **values: Any) -> Any:
    try:
        return lmms.ask(op, **values)
    except ValueError as error:
        raise UsageError(f"lmms-eval cannot score this ({error}); leave --scorer lmms-eval out.") from error


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a scorer may look at: anything that JSON can hold."""
    return json.loads(json.dumps({key: value for key, value in row.items() if key != "image"}, default=str))
