"""Score stored answers again with the suite's present scorer, with no model: a scorer's bug must not cost GPU hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmbench.header import now
from vlmbench.record import FINISHED, Status
from vlmbench.store import ResultStore, Run

if TYPE_CHECKING:
    from vlmbench.suite import Suite


class Rescored(NamedTuple):
    checked: int
    """Finished answers that were scored again."""
    changed: int
    """Of those, answers whose prediction, score or status is now another."""
    unknown: int
    """Stored answers to samples that the suite no longer has; they stay as they are."""

    def __str__(self) -> str:
        gone = f", {self.unknown} of samples that the suite no longer has" if self.unknown else ""
        return f"{self.checked} answers scored again, {self.changed} changed{gone}."


def rescore(root: Path | str, data_root: Path | None = None) -> Rescored:
    """Every run at or below `root`. Raises `UsageError` when there is none, or one is being written.

    `data_root` is where data sets lie now, if not where the run found them.
    """
    from vlmbench.registry import suites

    store, total = ResultStore(root), Rescored(0, 0, 0)
    for view in store.runs():
        spec = view.header["spec"]
        params = {
            key: tuple(value) if isinstance(value, list) else value for key, value in spec["suite_params"].items()
        }
        suite = suites.load(spec["suite"])(**params)
        if suite.needs_data:
            root = data_root or view.header["given"].get("data_root")
            suite = suite.located(None if root is None else Path(root))
        with store.reopen(view) as run:
            counts = rescore_run(run, suite)
        total = Rescored(*(a + b for a, b in zip(total, counts, strict=True)))
    return total


def rescore_run(run: Run, suite: Suite) -> Rescored:
    """Append a corrected record wherever the scorer now says something else. A second time changes nothing.

    The folder keeps its name, whose hash holds the suite's version at the time of the run; the header's `rescored`
    tells the version that the scores are of, and tables go by that.
    """
    samples = {sample.id: sample for sample in suite.samples("test")}
    checked = changed = unknown = 0
    for record in run.records.of("accuracy").values():
        if record.status not in FINISHED:
            continue
        sample = samples.get(record.id)
        if sample is None:
            unknown += 1
            continue
        checked += 1
        value, prediction = suite.score(sample, record.raw_text)
        status: Status = "parse_fail" if prediction is None else "ok"
        same = (status, prediction, sample.answer) == (record.status, record.prediction, record.answer)
        # Stored scores have seven digits.
        if not same or abs(value - record.score) > 1e-6:
            changed += 1
            run.append(
                dataclasses.replace(record, status=status, prediction=prediction, score=value, answer=sample.answer)
            )
    if changed or suite_version(run.header) != suite.version:
        entry = {"time": now(), "suite_version": suite.version, "checked": checked, "changed": changed}
        run.header.setdefault("rescored", []).append(entry)
        run.save_header()
    return Rescored(checked, changed, unknown)


def suite_version(header: Mapping[str, Any]) -> str:
    """The suite version that the stored scores are of."""
    rescored = header.get("rescored")
    return str(rescored[-1]["suite_version"] if rescored else header["spec"]["suite_version"])
