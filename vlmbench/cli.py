"""The command line. Every heavy import is inside the command that needs it, so that help and listing stay instant.

A command returns its exit code; what goes wrong is turned into one sentence and a code in `main`, in one place.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from vlmbench import __version__
from vlmbench.errors import RunError, UsageError
from vlmbench.plain import printable

DEMO_METHODS = ("pevlm", "turbo:mode=drop", "uniform:ratio=0.25", "blind", "prior")
DEMO_SUITE = "synthvideo:length=384"
DEMO_LIMIT = 11
DEMO_TIMED = 2

app = typer.Typer(
    help="Compare acceleration methods for vision-language models on the same samples.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone would double its cost
    pretty_exceptions_enable=False,
)


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Not an `Exception`, so that nothing takes it for a failed sample."""


class Kind(StrEnum):
    methods = "methods"
    suites = "suites"
    models = "models"


class Listing(StrEnum):
    text = "text"
    json = "json"


class BenchOp(StrEnum):
    attention = "attention"
    prefill = "prefill"
    decode = "decode"
    vision = "vision"


class Checked(StrEnum):
    contract = "contract"
    invariance = "invariance"


class Plot(StrEnum):
    pareto = "pareto"
    scaling = "scaling"
    stages = "stages"
    needle = "needle"


class Picture(StrEnum):
    png = "png"
    svg = "svg"


class Scorer(StrEnum):
    own = "own"
    lmms_eval = "lmms-eval"


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


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    model: Annotated[str | None, typer.Option(metavar="SPEC", help="Default: the suite's own.")] = None,
    method: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="Repeat it to compare.")] = None,
    suite: Annotated[str | None, typer.Option(metavar="SPEC", help="Default: synthvideo.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Samples, taken evenly over lengths and types. Default: all.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames a video. Default: the suite's own.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, at most --frames of them.")] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="RULE", help="How frames are picked. Default: the suite's.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Largest frame in pixels. Default: the model's.")] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Smallest frame in pixels. Default: the model's.")] = None,
    mode: Annotated[str, typer.Option(help="accuracy, latency, memory or all.")] = "all",
    attention: Annotated[str, typer.Option(help="sdpa, eager, flash or best.")] = "sdpa",
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer. Default: the suite's.")] = None,
    warmup: Annotated[int, typer.Option(help="Latency rounds before the first that counts.")] = 1,
    repeats: Annotated[int, typer.Option(help="Latency rounds that count.")] = 3,
    timed: Annotated[
        int | None, typer.Option(help="Videos that latency and memory are measured on. Default: 8.")
    ] = None,
    latency_limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Accuracy at the most frames that each method answers in that time."),
    ] = None,
    questions_per_video: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Time of K questions on one video, its keys and values kept where that is exact."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the device's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the weights.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights; methods have seeds of their own.")] = 0,
    out: Annotated[Path, typer.Option(help="Results folder; a run found there is resumed.")] = Path("runs"),
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie; generated suites need none.")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Run with the data that is there.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop stored records of this run first.")] = False,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Leave full attention out.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when a sample failed.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Run methods on a suite and print the comparison. Without a model, method and suite: the demo."""
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest
    from vlmbench.runner import run as start

    demo = model is None and not method and suite is None
    request = RunRequest(
        model=model,
        methods=DEMO_METHODS if demo else tuple(method or ()),
        suite=DEMO_SUITE if demo else suite or "synthvideo",
        limit=DEMO_LIMIT if demo and limit is None else limit,
        frames=frames,
        fps=fps,
        sampler=sampler,
        max_pixels=max_pixels,
        min_pixels=min_pixels,
        mode=mode,
        attention=attention,
        max_new_tokens=max_new_tokens,
        warmup=warmup,
        repeats=repeats,
        timed=timed if timed is not None else DEMO_TIMED if demo else 8,
        latency_limit=latency_limit,
        questions_per_video=questions_per_video,
        threads=threads,
        device=device,
        dtype=dtype,
        revision=revision,
        seed=seed,
        out=out,
        data_root=data_root,
        allow_partial=allow_partial,
        offline=offline,
        fresh=fresh,
        baseline=not no_baseline,
        strict=strict,
        debug=debug,
    )
    with Progress() as progress:
        return start(request, progress)


@app.command()
def fit(
    method: Annotated[str, typer.Option(metavar="SPEC", help="The method to fit.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The artefact to write.")],
    suite: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="Its train split is used. The shipped tiny models were trained on synthvideo's (seeds 0 to 199).",
        ),
    ],
    model: Annotated[str | None, typer.Option(metavar="SPEC", help="Default: the suite's own.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Settings to try at most, default all; of training, default 20 epochs.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames a video. Default: the suite's own.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Train questions. Default: 60 for a search, all for training.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Questions a training step. Default: 32.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default: 0.009 · batch / 256.")] = None,
    seed: Annotated[int, typer.Option(help="Of training and of random weights.")] = 0,
    max_loss: Annotated[float, typer.Option(help="Share of answers that may differ from full attention's.")] = 0.02,
    sampler: Annotated[str | None, typer.Option(metavar="RULE", help="How frames are picked.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Largest frame in pixels. Default: the model's.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the device's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the weights.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Choose a method's parameters for a model on a suite's train split, or train it, and write them to a file."""
    from vlmbench.fitting import fit as start
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest

    request = RunRequest(
        model=model,
        methods=(method,),
        suite=suite,
        limit=limit,
        frames=frames,
        sampler=sampler,
        max_pixels=max_pixels,
        mode="accuracy",
        threads=threads,
        device=device,
        dtype=dtype,
        revision=revision,
        offline=offline,
        seed=seed,
        debug=debug,
    )
    with Progress() as progress:
        return start(request, out, max_loss=max_loss, steps=steps, progress=progress, batch=batch, lr=lr)


@app.command(name="list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="Default: all three.")] = None,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
) -> int:
    """Name the methods, suites and models that are there."""
    rows = [row for each in ([kind] if kind else Kind) for row in _names(each)]
    if format is Listing.json:
        _print_rows(rows)
        return 0
    width = max(len(row["name"]) for row in rows) if rows else 0
    heading = None
    for row in rows:
        if row["kind"] != heading and kind is None:
            print(f"{row['kind']}s")
        heading = row["kind"]
        print(f"  {row['name']:<{width}}  {row['summary']}".rstrip())
    return 0


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def check(
    what: Annotated[
        Checked, typer.Argument(help="contract: what every method promises; invariance: answers that flip.")
    ],
    model: Annotated[str | None, typer.Option(metavar="SPEC", help="Default: the suite's own.")] = None,
    method: Annotated[str, typer.Option(metavar="SPEC", help="The method.")] = "full",
    suite: Annotated[str, typer.Option(metavar="SPEC", help="invariance: the questions.")] = DEMO_SUITE,
    limit: Annotated[int, typer.Option(help="invariance: how many of them.")] = DEMO_LIMIT,
    frames: Annotated[
        int | None, typer.Option(help="Frames a video. Default: the suite's own; 24 of noise for contract.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="KIND", help="invariance: attention, dtype or decoder alone.")
    ] = None,
    attention: Annotated[str, typer.Option(help="sdpa, eager, flash or best.")] = "sdpa",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the device's.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie; generated suites need none.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    format: Annotated[Listing, typer.Option(help="text is Markdown; json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Try a model and a method here before a long run. contract: exit 1 when a promise is broken."""
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest

    request = RunRequest(
        model=model,
        methods=(method,),
        suite=suite,
        limit=limit,
        frames=frames,
        mode="accuracy",
        attention=attention,
        threads=threads,
        device=device,
        dtype=dtype,
        data_root=data_root,
        offline=offline,
        debug=debug,
    )
    if what is Checked.contract:
        from vlmbench import check_contract

        checks = check_contract.run(request, frames or 24)
        if format is Listing.json:
            _print_rows([each._asdict() for each in checks])
        else:
            print(check_contract.to_markdown(checks).rstrip("\n"))
        return int(any(each.ok is False for each in checks))
    from vlmbench import check_invariance

    with Progress() as progress:
        rows = list(check_invariance.check(request, progress, only))
    if format is Listing.json:
        _print_rows([row._asdict() for row in rows])
    else:
        print(check_invariance.to_markdown(rows).rstrip("\n"))
    return 0


@app.command()
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
    rows = pairs.compare(*runs)
    if format is Listing.json:
        _print_rows(rows)
    else:
        print(pairs.to_markdown(rows, *runs).rstrip("\n"))
    return 0


@app.command()
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
        _print_rows(rows)
    else:
        print(headers.to_markdown(rows, (str(a), str(b))).rstrip("\n"))
    return 0


@app.command()
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


@app.command()
def score(
    suite: Annotated[str, typer.Option(metavar="SPEC", help="The suite that was answered.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines with an id and a text each.")],
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie; generated suites need none.")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Score with the data that is there.")] = False,
    scorer: Annotated[
        Scorer, typer.Option(help="lmms-eval: its scorer beside ours, and every difference (extra lmms).")
    ] = Scorer.own,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Score answers from a file, whichever program gave them, with no model."""
    from vlmbench import score as scores
    from vlmbench.session import make_suite

    found = make_suite(suite).located(data_root, allow_partial=allow_partial)
    if scorer is Scorer.lmms_eval:
        from vlmbench import score_lmms

        compared = score_lmms.compare(found, text)
        if format is Listing.json:
            _print_rows(score_lmms.to_rows(found, compared))
        else:
            print(score_lmms.to_text(compared))
        return 0
    rows = scores.score(found, text)
    if format is Listing.json:
        _print_rows(rows)
    else:
        print(scores.to_text(rows))
    return 0


data_app = typer.Typer(help="Look at a suite's data, or put its archives in place.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command()
def verify(
    suite: Annotated[str, typer.Option(metavar="SPEC", help="The suite whose data is looked at.")],
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie.")] = None,
    limit: Annotated[int | None, typer.Option(help="Media to decode, taken evenly. Default: all.")] = None,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Count rows, fields, media and subtitles, and decode them: exit 1 when something is missing or damaged."""
    from vlmbench import data_verify
    from vlmbench.progress import Progress
    from vlmbench.session import make_suite

    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")
    found = make_suite(suite)
    with Progress() as progress:
        checks = data_verify.verify(found, data_root, progress, limit)
    if format is Listing.json:
        _print_rows(data_verify.to_rows(found, checks))
    else:
        print(data_verify.to_text(checks))
    return 0 if all(check.ok for check in checks) else 1


@data_app.command()
def prepare(
    suite: Annotated[str, typer.Option(metavar="SPEC", help="The suite whose archives are unpacked.")],
    data_root: Annotated[Path, typer.Option(help="Where data sets lie: files go to its folder of the suite's name.")],
    archives: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the archives are. Default: there.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Join and unpack a suite's official archives; a second time goes on where the first stopped. Nothing is deleted."""
    from vlmbench import data_prepare
    from vlmbench.progress import Progress
    from vlmbench.session import make_suite

    with Progress() as progress:
        print(data_prepare.prepare(make_suite(suite), data_root, archives, progress))
    return 0


@app.command()
def bench(
    op: Annotated[BenchOp, typer.Argument(help="What is timed.")],
    method: Annotated[str, typer.Option(metavar="SPEC", help="The method whose operation is timed.")],
    frames: Annotated[int, typer.Option(help="Temporal units of the made-up video.")] = 64,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    tokens: Annotated[
        str | None, typer.Option(metavar="N/N", help="Prompt lengths instead of --frames, one row each.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="PRESET", help="Heads of a published model; the whole of it beyond attention.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 128,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    layers: Annotated[int | None, typer.Option(help="Of the language model, beyond attention. Default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens that decode generates.")] = 32,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds that count.")] = 7,
    check: Annotated[bool, typer.Option("--check", help="Compare with float64 first; no ratio on a mismatch.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the device's.")] = None,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Time one operation of a method, or a stage of a model with it, against the best dense kernel, in turns."""
    from vlmbench import bench as benches

    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, not {rounds}.")
    sizes = benches.shapes(
        frames=frames,
        frame_tokens=frame_tokens,
        tokens=tokens,
        preset=shape,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        batch=batch,
    )
    rows = [
        benches.bench(
            op, method, each, device=device, dtype=dtype, rounds=rounds, check=check, layers=layers, steps=steps
        )
        for each in sizes
    ]
    if format is Listing.json:
        _print_rows(rows)
    else:
        print(benches.to_text(rows))
    return 0


@app.command()
def plan(
    model: Annotated[str, typer.Option(metavar="SPEC", help="A preset, a shipped model, a folder or a hub id.")],
    device: Annotated[str, typer.Option(metavar="CARD", help="h200, h100, a100-80g, a100-40g, l40s or 4090.")],
    method: Annotated[str, typer.Option(metavar="SPEC", help="The method.")] = "full",
    frames: Annotated[int, typer.Option(help="Temporal units of the video (Qwen-VL: pairs of frames).")] = 64,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of each; a fixed-size tower has its own number.")] = 256,
    tokens: Annotated[str | None, typer.Option(metavar="N/N", help="Prompt lengths instead of --frames.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Answer tokens.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Say what a model, method and length take on a card, without loading or running anything."""
    from vlmbench import plan as plans
    from vlmbench.machine import pick_device, pick_dtype
    from vlmbench.madeup import shapes
    from vlmbench.session import make_methods

    (one,) = make_methods([method])
    kind = pick_dtype(dtype, pick_device("cpu"))
    sizes = shapes(tokens=tokens, frames=frames, frame_tokens=frame_tokens, preset=None)
    planned = [plans.plan(model, one, each, device, kind, max_new_tokens) for each in sizes]
    if format is Listing.json:
        _print_rows([row for rows in planned for row in rows])
    else:
        print("\n".join(plans.to_text(rows) for rows in planned))
    return 0


@app.command()
def doctor(
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    out: Annotated[Path, typer.Option(help="Results folder whose disk is looked at.")] = Path("runs"),
) -> int:
    """Show what works on this machine."""
    from vlmbench import doctor as checks

    rows = checks.rows(out)
    if format is Listing.json:
        _print_rows(rows)
    else:
        print(checks.to_text(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return int(app(args, prog_name="vlmbench", standalone_mode=False) or 0)
    except UsageError as error:
        return _fail(error, str(error), 2, args)
    except RunError as error:
        return _fail(error, str(error), 1, args)
    except Stopped as error:
        number = signal.Signals(error.args[0])
        resumes = args[:1] == ["run"] or (args[:1] == ["fit"] and any("memvp" in arg for arg in args))
        goes_on = "; the same command goes on from here" if resumes else ""
        return _fail(error, f"Stopped by {number.name}{goes_on}.", 128 + number, args)
    except Exception as error:
        if hasattr(error, "show"):  # typer's own: an unknown command, option or value
            error.show()
            return 2
        return _fail(error, f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}", 1, args)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(error: BaseException, sentence: str, code: int, args: list[str]) -> int:
    if "--debug" in args:
        traceback.print_exception(error)
    print(f"Error: {printable(sentence)}", file=sys.stderr)
    return code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _names(kind: Kind) -> Iterable[dict[str, str]]:
    if kind is Kind.models:
        from vlmbench.models import catalogue

        pairs = catalogue.names()
    else:
        from vlmbench import registry

        known = {Kind.methods: registry.methods, Kind.suites: registry.suites}[kind]
        pairs = [(name, known.summary(name)) for name in known.names()]
    return [{"kind": kind.removesuffix("s"), "name": name, "summary": summary} for name, summary in pairs]


def _print_rows(rows: list[dict[str, Any]]) -> None:
    print(json.dumps({"schema": 1, "rows": rows}, indent=1))
