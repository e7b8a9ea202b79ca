"""How the reference models answer: accuracy by question type, length and depth, and what happens inside while they do.

    python -m vlmbench.reference.inside --runs runs/reference --out results/cpu

writes ``reference.json`` (every number, and where it was measured), ``reference.md`` and pictures. Accuracies come from a store
that the runner fills as for `vlmbench run` (full attention, accuracy pass), so a second call computes only what is missing;
`inside_probes` measures the rest. ``--from reference.json`` draws text and pictures again without a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmbench.errors import UsageError
from vlmbench.header import cores, cpu_name, source, versions
from vlmbench.loaded import Loaded
from vlmbench.machine import load_backend
from vlmbench.progress import Progress
from vlmbench.record import FINISHED, SampleRecord
from vlmbench.reference import SHIPPED, expected_hash
from vlmbench.reference.inside_plots import draw
from vlmbench.reference.inside_probes import PROBE_QUESTIONS, probe
from vlmbench.reference.inside_text import to_markdown
from vlmbench.request import RunRequest
from vlmbench.runner import accuracy
from vlmbench.session import Session
from vlmbench.stats import accuracy_interval
from vlmbench.suites._synth.questions import TYPES
from vlmbench.suites.synthvideo import LENGTHS

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter
    from vlmbench.store import Run

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLES = 20
"""Questions of every length and depth; type and length are asked on the whole test split."""
ALL = "all"
"""Stands for all question types together."""


def measure(model: str, runs: Path, limit: int | None, progress: Progress) -> dict[str, Any]:
    """Everything about one model, ready for JSON."""
    origins: list[dict[str, Any]] = []
    answered = [
        record
        for length in LENGTHS  # one run a length: those that the discrimination table has as well
        for record in _answered(model, f"synthvideo:length={length}", runs, limit, progress, origins)
    ]
    by_type, failed = _by_type(answered)
    needle = []
    for length in LENGTHS:
        for depth in DEPTHS:
            suite = f"synthvideo:length={length},depth={depth:g}"
            records = _answered(model, suite, runs, min(limit or NEEDLES, NEEDLES), progress, origins)
            needle.append({"length": length, "depth": depth, **_cell(records)})
            failed += sum(each.status not in FINISHED for each in records)
    backend = load_backend(_request(model, "synthvideo", runs, limit), model)
    adapter: ModelAdapter = backend.adapter  # type: ignore[attr-defined]
    probed = probe(adapter, min(limit or PROBE_QUESTIONS, PROBE_QUESTIONS), progress)
    shapes = adapter.shapes
    return {
        "weights_sha256": expected_hash(model) if model in SHIPPED else None,
        "checkpoint_hash": backend.identity.weights_hash,
        "parameters": sum(each.numel() for each in adapter.model.parameters()),
        "layers": shapes.layers,
        "heads": shapes.heads,
        "neurons": shapes.intermediate,
        "n_failed": failed,
        "types": by_type,
        "needle": needle,
        "probes": probed,
        "measured_on": [*origins, _here()],
    }


# -- accuracies --------------------------------------------------------------------------------------------------------


def _request(model: str, suite: str, runs: Path, limit: int | None) -> RunRequest:
    return RunRequest(
        model=model, methods=("full",), suite=suite, mode="accuracy", limit=limit, device="cpu", out=runs, offline=True
    )


def _answered(
    model: str, suite: str, runs: Path, limit: int | None, progress: Progress, origins: list[dict[str, Any]]
) -> list[SampleRecord]:
    """Records of the first `limit` questions of the suite, with full attention: what is missing in the store is run."""
    with Session(_request(model, suite, runs, limit), progress) as session:
        progress.note(session.describe())
        (entry,) = session.entries
        accuracy(session, entry)
        origins += _origins(entry.run)
        found = Loaded(entry.run).accuracy
        return [found[sample.id] for sample in session.samples]


def _origins(run: Run) -> list[dict[str, Any]]:
    """Machine and versions of every session that a record of this run is from."""
    owners = {record.session for record in run.records.values()}
    return [
        {
            "cpu": session["device"]["cpu"],
            "cores": session["device"]["cores"],
            "threads": session["measure"]["threads"],
            "versions": session["versions"],
            "commit": session["commit"],
            "dirty": session["dirty"],
        }
        for session in run.header["sessions"]
        if session["id"] in owners
    ]


def _here() -> dict[str, Any]:
    import torch

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **source(),
    }


def _by_type(records: Sequence[SampleRecord]) -> tuple[list[dict[str, Any]], int]:
    """A row for every length and type, `ALL` first; and how many samples did not run to the end."""
    rows = []
    for length in dict.fromkeys(each.strata["length"] for each in records):
        of_length = [each for each in records if each.strata["length"] == length]
        kinds = {each.strata["type"] for each in of_length}
        for kind in [ALL, *(kind for kind in TYPES if kind in kinds)]:
            chosen = [each for each in of_length if kind in (ALL, each.strata["type"])]
            rows.append({"length": int(length), "type": kind, **_cell(chosen)})
    return rows, sum(each.status not in FINISHED for each in records)


def _cell(records: Sequence[SampleRecord]) -> dict[str, Any]:
    """Accuracy with its interval clustered by video; samples that did not finish are wrong."""
    scores = [each.score if each.status == "ok" else 0.0 for each in records]
    estimate = accuracy_interval(scores, [each.cluster for each in records])
    if estimate is None:
        raise UsageError("No question was answered; give a larger --limit.")
    return {"n": len(records), "accuracy": estimate.value, "low": estimate.low, "high": estimate.high}


# -- the command -------------------------------------------------------------------------------------------------------


def write(data: Mapping[str, Any], out: Path) -> None:
    """``reference.md`` and its pictures below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(data, out / "reference")
    (out / "reference.md").write_text(to_markdown(data, [f"reference/{each.name}" for each in pictures]), "utf-8")


def collect(models: Iterable[str], runs: Path, limit: int | None) -> dict[str, Any]:
    """The content of ``reference.json``."""
    with Progress() as progress:
        measured = {model: measure(model, runs, limit, progress) for model in models}
    origins = [json.dumps(each, sort_keys=True) for found in measured.values() for each in found.pop("measured_on")]
    return {"schema": 1, "measured_on": [json.loads(each) for each in dict.fromkeys(origins)], "models": measured}


def main(
    runs: Annotated[Path, typer.Option(help="Store of the runs; what is missing there is run.")] = Path(
        "runs/reference"
    ),
    out: Annotated[Path, typer.Option(help="Folder for reference.json, reference.md and reference/*.png.")] = Path(
        "results/cpu"
    ),
    model: Annotated[list[str] | None, typer.Option(help="Default: every shipped model.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of every run, and at most so many probed.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="Only redraw from this reference.json.")] = None,
) -> None:
    """Measure, write the numbers, and draw them."""
    if from_ is not None:
        write(json.loads(from_.read_text("utf-8")), out)
        return
    data = collect(model or SHIPPED, runs, limit)
    out.mkdir(parents=True, exist_ok=True)
    (out / "reference.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "utf-8")
    write(data, out)


if __name__ == "__main__":
    typer.run(main)
