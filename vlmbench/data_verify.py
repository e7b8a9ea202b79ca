"""``vlmbench data verify``: is a suite's data there, whole and readable, before hours are spent on it?

Every fault is a line with a number and an example; nothing is repaired and nothing fetched. Each video is opened in the
decoding worker and its first and last frame are decoded, which finds what is cut off; `limit` does so for some of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench.errors import UsageError
from vlmbench.video import DecodeError, Decoder

if TYPE_CHECKING:
    from vlmbench.progress import Progress
    from vlmbench.suite import Media, Sample, Suite
    from vlmbench.suites._official.base import OfficialSuite

SLACK_S, SLACK = 1.0, 0.02
"""Seconds, or share of the stated time, by which a container may differ: papers round, and containers count frames."""


@dataclass(frozen=True)
class Check:
    """One line: `found` of `expected` (None: nothing to compare with)."""

    check: str
    ok: bool
    found: int | None = None
    expected: int | None = None
    said: str = ""


def verify(suite: Suite, root: Path | None, progress: Progress, limit: int | None = None) -> list[Check]:
    """All checks of a suite whose data is below `root`. Raises `UsageError` when nothing of it is there.

    `limit`: how many media are decoded, taken evenly over the suite.
    """
    from vlmbench.suites._official.base import OfficialSuite
    from vlmbench.suites.folder import Folder

    if not suite.needs_data:
        raise UsageError(f"{suite.name} makes its own media: there is nothing to verify.")
    if not isinstance(suite, OfficialSuite):
        # Of one's own files those that are there are looked at; a task of lmms-eval takes all or none.
        found = suite.located(root, allow_partial=isinstance(suite, Folder), offline=True)
        return [
            *_decoded(found, found.samples(), progress, limit, None),
            Check("data hash", True, said=found.data_hash),
        ]
    without: dict[str, Any] = (
        {"subtitles": False} if hasattr(suite, "subtitles") else {}
    )  # they have a check of their own
    plain = replace(suite, **without)
    opened = plain.at(root, allow_partial=True, offline=True)
    checks, samples = _rows(opened)
    there = [sample for sample in samples if all(_there(opened, media) for media in sample.media)]
    if samples:
        paths = {media.path for sample in samples for media in sample.media}
        gone = sorted(path for sample in samples for path in _missing(opened, sample))
        said = f"the first missing: {gone[0]}" if gone else ""
        checks.append(Check("media", not gone, len(paths) - len(set(gone)), len(paths), said))
    checks += _decoded(opened, there, progress, limit, opened.seconds_stated)
    checks += _subtitles(opened)
    with contextlib.suppress(UsageError):  # what a run would refuse has no hash
        partial = not all(check.ok for check in checks)
        checks.append(Check("data hash", True, said=suite.at(root, allow_partial=partial, offline=True).data_hash))
    return checks


def to_rows(suite: Suite, checks: Sequence[Check]) -> list[dict[str, Any]]:
    return [{"suite": suite.name, **asdict(check)} for check in checks]


def to_text(checks: Sequence[Check]) -> str:
    """``ok    rows      2700 of 2700``, one line a check."""
    lines = []
    for check in checks:
        count = "" if check.found is None else f"{check.found}"
        count += "" if check.expected is None else f" of {check.expected}"
        lines.append(f"{'ok' if check.ok else 'FAULT':<6}{check.check:<12}{count:<14}{check.said}".rstrip())
    return "\n".join(lines)


def _rows(suite: OfficialSuite) -> tuple[list[Check], list[Sample]]:
    """The checks of the rows, and a sample of each row that can be used."""
    table = suite._table  # raises `UsageError`: without a file there is nothing to verify
    n = len(table.rows)
    same = n == suite._expected_rows
    rows = Check("rows", same, n, suite._expected_rows, "" if same else f"in {table.origin}")
    faults: list[str] = []
    try:
        samples = suite.read(table)
    except UsageError:
        samples, faults = _one_by_one(suite)
    twice = len(samples) - len({sample.id for sample in samples})
    said = faults[0] if faults else f"{twice} questions are there twice" if twice else ""
    # A suite may ask about some of its rows only (a duration, a kind); those it leaves out are no fault.
    fields = Check("fields", not said, n - len(faults) - twice, n, said)
    return [rows, fields], samples


def _one_by_one(suite: OfficialSuite) -> tuple[list[Sample], list[str]]:
    """Samples of the good rows, a sentence for each bad one."""
    samples: list[Sample] = []
    faults: list[str] = []
    table = suite._table
    for number, row in enumerate(table.rows):
        try:
            found = suite.read(replace(table, rows=[row]))
        except UsageError as error:
            faults.append(str(error))
            continue
        where = row.get("number", number)  # a picture is found by the number of its row
        samples += [replace(each, extra={**each.extra, "picture": where}) for each in found]
    return samples, faults


def _there(suite: OfficialSuite, media: Media) -> bool:
    return suite._table.picture is not None or media.path.exists()


def _missing(suite: OfficialSuite, sample: Sample) -> list[Path]:
    return [media.path for media in sample.media if not _there(suite, media)]


def _decoded(
    suite: Suite,
    samples: Iterable[Sample],
    progress: Progress,
    limit: int | None,
    stated: Callable[[Sample], tuple[float, float] | None] | None,
) -> list[Check]:
    """Media that can be decoded, and whether videos are as long as the data set says."""
    first: dict[Media, Sample] = {}
    for sample in samples:
        for media in sample.media:
            first.setdefault(media, sample)
    if not first:
        return []
    media_ = list(first)
    chosen = media_[:: max(1, -(-len(media_) // limit))] if limit else media_
    bad, wrong, compared = [], [], 0
    with Decoder() as decoder:
        progress.start(len(chosen), f"verify · {suite.name}")
        for media in chosen:
            progress.stage(media.path.name)
            try:
                suite.materialise(first[media])
                clip = decoder.read(media.path, kind=media.kind, frames=2, rule="endpoints")
            except (DecodeError, OSError) as error:
                bad.append(" ".join(str(error).split()))
            else:
                span = stated(first[media]) if stated and media.kind == "video" else None
                if span is not None:
                    compared += 1
                    seconds = clip.times_s[-1] + 1 / clip.fps
                    if not _within(seconds, *span):
                        wrong.append(f"{media.path.name} has {seconds:.1f} s, not {_span(*span)}")
            progress.advance()
        progress.finish()
    checks = [Check("decodable", not bad, len(chosen) - len(bad), len(chosen), bad[0] if bad else "")]
    if compared:
        checks.append(Check("duration", not wrong, compared - len(wrong), compared, wrong[0] if wrong else ""))
    return checks


def _within(seconds: float, low: float, high: float) -> bool:
    return low - max(SLACK_S, SLACK * low) <= seconds <= high + max(SLACK_S, SLACK * high)


def _span(low: float, high: float) -> str:
    return f"{low:g} s" if low == high else f"{low:g} to {high:g} s"


def _subtitles(suite: OfficialSuite) -> list[Check]:
    try:
        files, expected = suite.subtitle_files()
    except (KeyError, TypeError):  # no row names any, and the line on fields says so
        return []
    if not expected:
        return []
    bad, overlapping = [], 0
    for path in files:
        try:
            lines = suite.read_subtitles(path)
        except (OSError, ValueError) as error:
            bad.append(" ".join(str(error).split()))
            continue
        spans = sorted((line.start_s, line.end_s) for line in lines)
        overlapping += any(end > start for (_, end), (start, _) in itertools.pairwise(spans))
    said = bad[0] if bad else f"lines overlap in {overlapping}" if overlapping else ""
    return [Check("subtitles", not bad and len(files) >= expected, len(files) - len(bad), expected, said)]
