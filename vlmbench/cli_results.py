"""The commands that read stored results: ``table``, ``plot``, ``gate``, ``compare``, ``explain`` and ``rescore``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vlmbench.cli_choices import Listing, print_rows
from vlmbench.errors import UsageError


class Plot(StrEnum):
    pareto = "pareto"
    scaling = "scaling"
    stages = "stages"
    needle = "needle"


class Picture(StrEnum):
    png = "png"
    svg = "svg"


class TableFormat(StrEnum):
    md = "md"
    csv = "csv"
    json = "json"
    latex = "latex"


class Layout(StrEnum):
    efficiency = "efficiency"
    image_retention = "image-retention"
    video_retention = "video-retention"
    latency_budget = "latency-budget"
    models_as_bands = "models-as-bands"
    scaling = "scaling"


def table(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder, or one inside it.")],
    format: Annotated[
        TableFormat, typer.Option(help="md for people, csv or json for programs, latex for papers.")
    ] = TableFormat.md,
    layout: Annotated[Layout | None, typer.Option(help="As papers print it. Default: one row a run.")] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="With --layout: a table for each value, such as model or frames."),
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Show what papers report (results/published.yaml) in a table of its own below."
        ),
    ] = None,
) -> int:
    """Print the comparison that a results folder holds."""
    if published is not None and (layout is not None or format not in (TableFormat.md, TableFormat.json)):
        raise UsageError(
            "--published stands below the plain table in md or json; leave --layout out, and csv and latex."
        )
    if layout is not None:
        from vlmbench import laid_text, layouts

        laid = layouts.tables(folder, layout, split)
        writers = (laid_text.to_markdown, laid_text.to_csv, laid_text.to_json, laid_text.to_latex)
        print(dict(zip(TableFormat, writers, strict=True))[format](laid).rstrip("\n"))
        return 0
    if split is not None or format is TableFormat.latex:
        what = "--split" if split is not None else "--format latex"
        raise UsageError(f"{what} needs a --layout; choose one of {', '.join(Layout)}.")
    from vlmbench import report

    rows = report.rows(folder)
    if published is not None:
        from vlmbench import published as papers

        found = papers.beside(papers.read(published), rows)
        if format is TableFormat.json:
            print(json.dumps({**json.loads(report.to_json(rows)), "published": found}, indent=1))
        else:
            print(f"{report.to_markdown(rows)}\n{papers.to_markdown(found)}".rstrip("\n"))
        return 0
    writer = {"md": report.to_markdown, "csv": report.to_csv, "json": report.to_json}[format]
    print(writer(rows).rstrip("\n"))
    return 0


def plot(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder, or one inside it.")],
    kind: Annotated[
        list[Plot] | None, typer.Option(help="Repeatable. Default: all that the folder has results for.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path("plots"),
    format: Annotated[list[Picture] | None, typer.Option(help="Repeatable. Default: both.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Draw accuracy against time, times and memory against length, stages, and needle maps."""
    from vlmbench import plot as plots

    for path in plots.plot(folder, out, tuple(kind or ()), tuple(format or Picture)):
        print(path)
    return 0


def gate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Results of one run of full attention and methods.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Floors as --update-baseline wrote them.")
    ] = None,
    min_speedup: Annotated[
        list[str] | None, typer.Option(metavar="A=X", help="Least speed-up of method A over full attention.")
    ] = None,
    max_accuracy_drop: Annotated[
        list[str] | None, typer.Option(metavar="A=X", help="Most accuracy, 0 to 1, that A may lose against full.")
    ] = None,
    span: Annotated[
        list[str] | None, typer.Option(help="vision, prefill, ttft, decode or e2e. Default: e2e. Repeatable.")
    ] = None,
    ratios_only: Annotated[
        bool, typer.Option("--ratios-only", help="Compare with a baseline of another card, driver or torch.")
    ] = False,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write what this run reaches into --baseline.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="How far below the speed-up of now --update-baseline sets a floor.")
    ] = 0.1,
    format: Annotated[Listing, typer.Option(help="text is Markdown; json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Hold a run against floors: exit 0 when they are reached, 1 when one is missed, 3 when the data cannot tell."""
    from vlmbench import gate as gates
    from vlmbench import gate_text

    judged, said = gates.gate(
        folder,
        baseline=baseline,
        min_speedup=min_speedup or (),
        max_accuracy_drop=max_accuracy_drop or (),
        spans=tuple(span or ("e2e",)),
        ratios_only=ratios_only,
        update=update_baseline,
        tolerance=tolerance,
    )
    writer = gate_text.to_json if format is Listing.json else gate_text.to_markdown
    print(writer(judged, said).rstrip("\n"))
    return gates.EXIT[gates.overall(judged)]


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder, or the beginning of its name.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another run's.")],
    format: Annotated[Listing, typer.Option(help="text is Markdown; json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Pair two stored runs, sample by sample: accuracy, answers, times and memory of B against A."""
    from vlmbench import compare as pairs
    from vlmbench.stored import one_run

    runs = (one_run(a), one_run(b))
    writer = pairs.to_json if format is Listing.json else pairs.to_markdown
    print(writer(pairs.compare(*runs), *runs).rstrip("\n"))
    return 0


def explain(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder, or the beginning of its name.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another run's.")],
    format: Annotated[Listing, typer.Option(help="text is Markdown; json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Name the conditions in which two stored runs differ, and what each is known to do."""
    from vlmbench import explain as headers
    from vlmbench.stored import one_run

    rows = headers.explain(one_run(a), one_run(b))
    if format is Listing.json:
        print_rows(rows)
    else:
        print(headers.to_markdown(rows, (str(a), str(b))).rstrip("\n"))
    return 0


def rescore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder, or one inside it.")],
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets lie now. Default: where the run found them.")
    ] = None,
) -> int:
    """Score stored answers again, with no model."""
    from vlmbench import report

    print(report.rescore(folder, data_root))
    return 0
