"""`vlmbench gate`: does a run still reach its floors? For CI, where a wrong alarm costs as much as a missed regression.

Only ratios and differences to full attention, taken in turns in the run itself, are judged, never seconds. A floor fails
only when the whole 95 % interval lies below it. An interval that straddles the floor decides nothing when it is wide, and
that is an answer of its own (exit 3): more videos (`run --timed`, which goes on where the run stopped) make it narrower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmbench import stats
from vlmbench.errors import UsageError
from vlmbench.floors import METRICS, Baseline, Key
from vlmbench.gate_runs import Measured, measured
from vlmbench.loaded import BASELINE
from vlmbench.spec import Spec, parse_chain
from vlmbench.tables import SPANS

WIDE = 0.05
"""Half-width, relative for a ratio and absolute for an accuracy, above which an interval round a floor says nothing."""

Verdict = Literal["pass", "fail", "inconclusive"]
EXIT: dict[Verdict, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


@dataclass(frozen=True)
class Judged:
    """One floor and what became of it."""

    key: Key
    metric: str
    floor: float
    given: Literal["command line", "baseline"]
    estimate: stats.Estimate
    verdict: Verdict
    p: float | None = None
    """Of an accuracy: McNemar's, as in `Measured`."""
    detectable: float | None = None


def gate(
    folder: Path,
    *,
    baseline: Path | None = None,
    min_speedup: Sequence[str] = (),
    max_accuracy_drop: Sequence[str] = (),
    spans: Sequence[str] = ("e2e",),
    ratios_only: bool = False,
    update: bool = False,
    tolerance: float = 0.1,
) -> tuple[list[Judged], list[str]]:
    """Every floor judged, and what has to be said beside them. Raises `UsageError` when they cannot be compared.

    A floor of the command line stands for the baseline's. With `update` the baseline's floors are not judged but
    replaced by what this run reaches, unless a floor of the command line failed.
    """
    if not (baseline or min_speedup or max_accuracy_drop):
        raise UsageError("gate has nothing to compare with; give --baseline, --min-speedup or --max-accuracy-drop.")
    if update and baseline is None:
        raise UsageError("--update-baseline needs a file to write; name it with --baseline.")
    if not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance must be at least 0 and below 1, not {tolerance:g}.")
    for span in spans:
        if span not in SPANS:
            raise UsageError(f"--span must be one of {', '.join(SPANS)}, not {span!r}.")
    runs = measured(folder)
    typed = _typed(runs, min_speedup, max_accuracy_drop, spans)
    judged = [_judge(run, metric, floor, "command line") for run, metric, floor in typed]
    if baseline is not None and update:
        if any(each.verdict == "fail" for each in judged):
            return judged, [f"{baseline} is left as it is: a floor of the command line failed"]
        kept = {(run.key, metric): floor for run, metric, floor in typed}
        wanted = (*(f"speedup_{span}" for span in spans), "accuracy_delta")
        store = Baseline.read(baseline) if baseline.exists() else Baseline(baseline)
        floors = {run.key: _floors(run, wanted, kept, tolerance) for run in runs}
        if not any(floors.values()):
            raise UsageError(f"{folder} holds neither interleaved times nor accuracies; run it with --mode all.")
        store.update(runs[0].machine, {key: each for key, each in floors.items() if each})
        gaps = [
            f"`{run.key.method_spec}`: no {metric}"
            for run in runs
            for metric in wanted
            if metric not in floors[run.key]
        ]
        return judged, [
            f"{baseline} now holds what this run reaches",
            *([f"not measured, so without a floor: {', '.join(gaps)}"] if gaps else []),
        ]
    said: list[str] = []
    if baseline is not None:
        rows, note = Baseline.read(baseline).of(runs[0].machine, ratios_only)
        said += [note] if note else []
        decided = {(run.key, metric) for run, metric, _ in typed}
        by_key = {run.key: run for run in runs}
        for row in rows:
            if row.key not in by_key:
                raise UsageError(
                    f"{baseline} has a floor for {row.key.text}, which {folder} does not hold; run it too."
                )
            run = by_key[row.key]
            judged += [
                _judge(run, metric, floor, "baseline")
                for metric, floor in row.floors.items()
                if (run.key, metric) not in decided
            ]
    if not judged:
        raise UsageError(f"{baseline} holds no floors for this machine; --update-baseline writes them.")
    open_ = [run.key.method_spec for run in runs if all(each.key != run.key for each in judged)]
    if open_:
        said.append(f"without a floor: {', '.join(f'`{each}`' for each in open_)}")
    return judged, [*said, *_setting(runs)]


def _typed(
    runs: Sequence[Measured], min_speedup: Sequence[str], max_drop: Sequence[str], spans: Sequence[str]
) -> list[tuple[Measured, str, float]]:
    """(run, metric, floor) of the command line. Raises `UsageError`."""
    floors: dict[tuple[Key, str], tuple[Measured, str, float]] = {}
    for option, values in (("--min-speedup", min_speedup), ("--max-accuracy-drop", max_drop)):
        for text in values:
            name, equals, number = text.rpartition("=")
            try:
                limit = float(number)
            except ValueError:
                limit = math.nan
            in_range = 0 < limit < math.inf if option == "--min-speedup" else 0 <= limit <= 1
            if not equals or not in_range:
                wanted = "above 0" if option == "--min-speedup" else "from 0 to 1"
                raise UsageError(f"{option} must be METHOD=NUMBER with a number {wanted}, not {text!r}.")
            metrics = [f"speedup_{span}" for span in spans] if option == "--min-speedup" else ["accuracy_delta"]
            for run in _named(runs, name, option):
                for metric in metrics:
                    floors[run.key, metric] = (run, metric, limit if option == "--min-speedup" else -limit)
    return list(floors.values())


def _named(runs: Sequence[Measured], text: str, option: str) -> list[Measured]:
    """Runs of a method spec; parameters that it does not name may be any."""
    chain = parse_chain(text)
    found = [run for run in runs if _is(chain, run.key.method_spec)]
    if not found:
        there = ", ".join(dict.fromkeys(run.key.method_spec for run in runs))
        raise UsageError(f"{option} names {text}, which the folder does not hold; it holds {there}.")
    return found


def _is(named: Sequence[Spec], stored: str) -> bool:
    """The same methods in the same order, with the parameters that are named; a stored name may be any text."""
    try:
        run = parse_chain(stored)
    except UsageError:
        return False
    return [each.name for each in named] == [each.name for each in run] and all(
        one.params.items() <= other.params.items() for one, other in zip(named, run, strict=True)
    )


def _estimate(run: Measured, metric: str) -> stats.Estimate:
    if metric in run.estimates:
        return run.estimates[metric]
    if metric == "accuracy_delta":
        raise UsageError(
            f"{run.key.text} has no accuracy beside {BASELINE}'s; run both with --mode all or --mode accuracy."
        )
    why = next((mark for mark in run.marks if mark.startswith("inactive")), "no interleaved times")
    raise UsageError(f"{run.key.text} has no {metric} ({why}); run it with --mode all on samples that it can act on.")


def _judge(run: Measured, metric: str, floor: float, given: Literal["command line", "baseline"]) -> Judged:
    estimate, accuracy = _estimate(run, metric), metric == "accuracy_delta"
    tested = (run.p, run.detectable) if accuracy else ()
    return Judged(run.key, metric, floor, given, estimate, verdict(estimate, floor, relative=not accuracy), *tested)


def verdict(estimate: stats.Estimate, floor: float, *, relative: bool) -> Verdict:
    """Fails when the whole interval is below the floor; a wide one on both sides of it, or none, is inconclusive."""
    value, low, high = estimate
    if low is None or high is None:
        return "inconclusive"
    if high < floor:
        return "fail"
    half = (high - low) / 2 / (value if relative else 1.0)
    return "inconclusive" if low < floor and half > WIDE else "pass"


def _floors(
    run: Measured, wanted: Sequence[str], typed: Mapping[tuple[Key, str], float], tolerance: float
) -> dict[str, float]:
    """The floors that an update writes: as typed, else a `tolerance` below a speed-up, and an accuracy's interval.

    An accuracy floor is never above the interval's lower end: what this many questions cannot tell apart is no loss.
    """
    found = {}
    for metric in wanted:
        if metric not in run.estimates:
            continue
        value, low, _ = run.estimates[metric]
        if low is None:
            raise UsageError(
                f"{run.key.text} was timed on {run.n_timed} videos, too few for an interval; give run --timed "
                f"{stats.MIN_CLUSTERS} or more before --update-baseline."
            )
        derived = min(value, low) if metric == "accuracy_delta" else value * (1 - tolerance)
        found[metric] = typed.get((run.key, metric), math.floor(derived * 1e4) / 1e4)
    return found


def overall(judged: Sequence[Judged]) -> Verdict:
    """The worst: one failure fails, else one open question leaves all open."""
    verdicts = {each.verdict for each in judged}
    worst: Sequence[Verdict] = ("fail", "inconclusive")
    return next((each for each in worst if each in verdicts), "pass")


def _setting(runs: Sequence[Measured]) -> list[str]:
    work = dict.fromkeys(f"{run.key.model} on {run.key.suite} ({run.key.shape})" for run in runs)
    counts = f"{max(run.n for run in runs)} questions, {max(run.n_timed for run in runs)} videos timed"
    return [f"{'; '.join(work)}; {counts}", str(runs[0].machine)]


__all__ = ["EXIT", "METRICS", "Judged", "gate", "measured", "overall", "verdict"]
