"""What a gate looks at: every method of a results folder with its speed-ups and its accuracy difference to full attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbench import significance, stats
from vlmbench.errors import UsageError
from vlmbench.floors import Key, Machine
from vlmbench.loaded import BASELINE, Loaded, texts
from vlmbench.report import loaded_rows
from vlmbench.spec import Spec
from vlmbench.store import ResultStore
from vlmbench.tables import SPANS, wrote


@dataclass(frozen=True)
class Measured:
    """One run, as far as a gate looks at it."""

    key: Key
    machine: Machine
    estimates: Mapping[str, stats.Estimate]
    """Metric -> what was measured; a metric of `METRICS` without an entry was not."""
    marks: Sequence[str]
    n: int
    """Questions that the accuracy difference is over."""
    n_timed: int
    p: float | None = None
    """Of McNemar's test on those questions."""
    detectable: float | None = None
    """The least loss of accuracy that so many questions show in four of five cases."""


def measured(folder: Path) -> list[Measured]:
    """Every method of a results folder but full attention. Raises `UsageError` when they cannot be gated."""
    views = ResultStore(folder).runs()
    try:
        found = _measured(folder, views)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder} holds a run whose header or records lack something ({error}); run it again."
        ) from error
    machines = {run.machine: run.key for run in found}
    if not found:
        raise UsageError(f"{folder} holds no method beside {BASELINE}; run one with --method.")
    if twice := next((run for run in found if sum(other.key == run.key for other in found) > 1), None):
        raise UsageError(f"{folder} holds {twice.key.text} twice (seed, weights or sampler differ); gate one of them.")
    if len(machines) > 1:
        raise UsageError(
            f"{folder} holds runs of several machines ({'; '.join(map(str, machines))}); gate one machine at a time."
        )
    return found


def _measured(folder: Path, views: Sequence[Any]) -> list[Measured]:
    pairs = loaded_rows(views)
    found = []
    for run, row in pairs:
        if run.header["status"] != "done":
            raise UsageError(
                f"{run.view.folder} is not complete ({run.header['status']}); the same `vlmbench run` command goes on."
            )
        if run.method == BASELINE:
            continue
        full = next((each for each, _ in pairs if each.method == BASELINE and each.group == run.group), None)
        estimates = {f"speedup_{span}": stats.Estimate(*_parts(row, f"speedup_{span}")) for span in SPANS}
        ids = sorted(run.scores.keys() & full.scores.keys()) if full else []
        own, dense = ([each.scores[id_] for id_ in ids] for each in (run, full or run))
        # Unlike a table's `accuracy_delta` this counts what did not finish, as wrong: running out of memory is a loss too.
        paired = (own, dense, [run.accuracy[id_].cluster for id_ in ids])
        delta = stats.paired_delta(*paired)
        found.append(
            Measured(
                key=Key(
                    model=str(row["model"]),
                    suite=str(row["suite"]),
                    method=run.method,
                    params=run.params,
                    shape=_shape(run),
                ),
                machine=_machine(run),
                estimates={name: each for name, each in estimates.items() if each.value is not None}
                | ({"accuracy_delta": delta} if delta else {}),
                marks=row["marks"],
                n=len(ids),
                n_timed=len({each.cluster for each in run.latency.values()}),
                p=significance.mcnemar(*paired),
                detectable=significance.detectable(*paired),
            )
        )
    return found


def _parts(row: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


def _shape(run: Loaded) -> str:
    """What decides how much there is to compute, beside model, suite and method."""
    named = ("frames", "fps", "max_pixels", "min_pixels", "max_new_tokens", "dtype", "attention")
    return Spec("", texts({name: run.spec[name] for name in named})).__str__().lstrip(":")


def _machine(run: Loaded) -> Machine:
    """Raises `UsageError` when the run's records are from several."""
    found = {Machine.of(session) for session in wrote(run.view)}
    if len(found) > 1:
        raise UsageError(
            f"{run.view.folder} holds records of several machines ({'; '.join(sorted(map(str, found)))}); run it again "
            "with --fresh."
        )
    return found.pop()
