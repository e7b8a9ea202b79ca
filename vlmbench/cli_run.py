"""The commands that answer questions with a model: ``run`` and ``fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmbench.cli_choices import DEMO_LIMIT, DEMO_METHODS, DEMO_SUITE, DEMO_TIMED


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
    trivial: Annotated[
        bool, typer.Option("--trivial", help="Also ask random, uniform and downsample at each method's own budget.")
    ] = False,
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
        trivial=trivial,
        strict=strict,
        debug=debug,
    )
    with Progress() as progress:
        return start(request, progress)


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
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie; generated suites need none.")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Fit with the data that is there.")] = False,
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
        data_root=data_root,
        allow_partial=allow_partial,
        offline=offline,
        seed=seed,
        debug=debug,
    )
    with Progress() as progress:
        return start(request, out, max_loss=max_loss, steps=steps, progress=progress, batch=batch, lr=lr)
