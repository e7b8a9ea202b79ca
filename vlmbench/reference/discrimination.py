"""Can the suite tell methods apart? What throws information away has to lose: a committed table, and a gate.

python -m vlmbench.reference.discrimination [--model SPEC …] [--limit N] [--runs DIR] [--out FILE]

Runs what is not in `--runs` yet, writes the table as JSON and Markdown, and exits with 1 when a loss is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmbench.errors import UsageError

ORDER = ("first", "last", "before", "after", "which_first", "list")
"""Types of question that ask what came when."""
MODELS = ("tiny-llava-ov", "tiny-qwen2.5-vl")
LENGTHS = (32, 128, 384)


@dataclass(frozen=True)
class Loss:
    """A method, and by how much it must be worse than `full` on the same questions."""

    method: str
    least: float
    """In accuracy, 0–1; 0 means: below, beyond the error of the difference."""
    types: tuple[str, ...] | None = None
    """Of questions; None means all."""
    frames: int | None = None
    """`--frames`, for the loss by looking too rarely."""
    lengths: tuple[int, ...] = LENGTHS


LOSSES = (
    Loss("blind", 0.5),
    Loss("prior", 0.5),
    Loss("random:ratio=0.1", 0.2),
    Loss("downsample:ratio=0.1", 0.2),
    Loss("pevlm:positions=reused,sink=0", 0.1, ORDER),
    *(Loss("full", 0.0, None, length // 4, (length,)) for length in LENGTHS),
)


def measure(model: str, loss: Loss, length: int, runs: Path, limit: int) -> None:
    """`vlmbench run` for one row and its baseline; what is stored is not run again."""
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest
    from vlmbench.runner import run

    request = RunRequest(
        model=model,
        methods=() if loss.method == "full" else (loss.method,),
        suite=f"synthvideo:length={length}",
        limit=limit,
        frames=loss.frames,
        mode="accuracy",
        out=runs,
    )
    with Progress() as progress:
        if run(request, progress):
            raise typer.Exit(1)


def rows(runs: Path, models: Sequence[str], losses: Sequence[Loss] = LOSSES) -> list[dict[str, Any]]:
    """One a model, loss and length: both accuracies on the same questions, and their paired difference."""
    from vlmbench.loaded import Loaded
    from vlmbench.registry import methods
    from vlmbench.spec import build, params_of, parse
    from vlmbench.stats import accuracy_interval, paired_delta
    from vlmbench.store import ResultStore

    found = [
        run
        for run in map(Loaded, ResultStore(runs).runs())
        if run.spec["suite"] == "synthvideo" and not {"type", "depth", "cuts"} & _given(run.spec["suite_params"])
    ]

    def one(model: str, length: int, frames: int | None, method: str) -> Loaded:
        spec = parse(method)
        params = params_of(build(methods.load(spec.name), spec, "Method")).items()
        here = [
            run
            for run in found
            if (run.spec["model"], run.method, run.spec["frames"]) == (model, spec.name, frames)
            and run.spec["suite_params"]["length"] == length
            and params <= run.spec["method_params"].items()  # what a method was fitted to stands there as well
        ]
        if len(here) != 1:
            raise UsageError(
                f"{runs} holds {len(here)} runs of {method} by {model} at {length} frames, of other weights or settings "
                f"when several; give an empty folder."
            )
        return here[0]

    table = []
    for model in models:
        for loss in losses:
            for length in loss.lengths:
                full = one(model, length, None, "full")
                less = one(model, length, loss.frames, loss.method)
                asked = [
                    id_
                    for id_, record in full.accuracy.items()
                    if id_ in less.accuracy and (loss.types is None or record.strata["type"] in loss.types)
                ]
                clusters = [full.accuracy[id_].cluster for id_ in asked]
                dense, theirs = ([run.scores[id_] for id_ in asked] for run in (full, less))
                accuracy, difference = accuracy_interval(dense, clusters), paired_delta(theirs, dense, clusters)
                if accuracy is None or difference is None or difference.high is None:
                    raise typer.BadParameter(f"{runs} holds no answer of {loss.method} at {length} frames.")
                table.append(
                    {
                        "model": model,
                        "method": loss.method + (f" --frames {loss.frames}" if loss.frames else ""),
                        "length": length,
                        "questions": "order" if loss.types else "all",
                        "n": len(asked),
                        "full": accuracy.value,
                        "accuracy": accuracy.value + difference.value,
                        "loss": -difference.value,
                        "loss_low": -difference.high,
                        "loss_high": -difference.low if difference.low is not None else None,
                        "least": loss.least,
                        "holds": -difference.value >= loss.least and difference.high < 0,
                    }
                )
    return table


def _given(params: Mapping[str, Any]) -> set[str]:
    return {key for key, value in params.items() if value is not None}


def verdict(row: Mapping[str, Any]) -> str:
    """Of the whole interval: a loss whose interval holds the asked one is open, whatever the point says."""
    if row["least"] == 0:
        return "held" if row["loss_low"] > 0 else "MISSING" if row["loss_high"] <= 0 else "open"
    if row["loss_low"] >= row["least"]:
        return "held"
    return "MISSING" if row["loss_high"] < row["least"] or row["loss_low"] <= 0 else "open"


def to_markdown(data: Mapping[str, Any]) -> str:
    """What `main` wrote, to read."""
    table, on = data["rows"], data.get("measured_on")
    lines = [
        "# What throws information away loses",
        "",
        "Written from `discrimination.json`; do not edit. `python -m vlmbench.reference.discrimination` asks the shipped "
        f"models {_range(row['n'] for row in table if row['questions'] == 'all')} questions on `synthvideo` at each length, "
        "all frames unless a method says otherwise, accuracy alone, and pairs each method with full attention on the same "
        "questions. *order* questions ask what came when. `loss` is full attention's accuracy minus the method's, with its "
        "95 % interval clustered by video; `at least` is the loss that was asked for (0: any loss). **held**: the whole "
        "interval is at or above it (above 0); **open**: the loss is beyond its error, and its interval holds more "
        "and less than asked; **MISSING**: it is not, or all of the interval is below.",
        "",
        "Measured on " + ("; ".join(on) if on else "a CPU; machine, versions and commit not recorded") + ".",
        "",
        "| model | method | frames | questions | n | full | method's | loss [95 %] | at least | verdict |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in table:
        loss = f"{row['loss']:.2f} [{row['loss_low']:.2f}, {row['loss_high']:.2f}]"
        lines.append(
            f"| {row['model']} | `{row['method']}` | {row['length']} | {row['questions']} | {row['n']} | {row['full']:.2f} "
            f"| {row['accuracy']:.2f} | {loss} | {row['least']:.2f} | {verdict(row)} |"
        )
    return "\n".join(lines) + "\n"


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return "no" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def measured_on(runs: Path, models: Sequence[str]) -> list[str]:
    """Machines and versions of the stored answers, once each."""
    from vlmbench.store import ResultStore
    from vlmbench.tables import versions_text, wrote

    views = [view for view in ResultStore(runs).runs(skim=True) if view.header["spec"]["model"] in models]
    sessions = [session for view in views for session in wrote(view)]
    said = (
        f"{each['device']['cpu']}, {each['device']['cores']} cores, {each['measure']['threads']} threads; {versions_text(each)}"
        for each in sessions
    )
    return sorted(set(said))


def main(
    model: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="Default: both shipped ones.")] = None,
    limit: Annotated[int, typer.Option(help="Questions a length.")] = 55,
    runs: Annotated[Path, typer.Option(help="Results folder; what is there is not run again.")] = Path(
        "runs/reference"
    ),
    out: Annotated[Path, typer.Option(help="Without suffix: .json and .md are written.")] = Path(
        "results/cpu/discrimination"
    ),
) -> None:
    for spec in model or MODELS:
        for loss in LOSSES:
            for length in loss.lengths:
                measure(spec, loss, length, runs, limit)
    table = rows(runs, model or MODELS)
    data = {"schema": 1, "measured_on": measured_on(runs, model or MODELS), "rows": table}
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(to_markdown(data), "utf-8")
    print(to_markdown(data))
    if not all(row["holds"] for row in table):
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(str(error)) from None
