"""The commands about this machine, or another: ``check``, ``bench``, ``plan``, ``doctor``, and ``list`` of what there is."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmbench.cli_choices import DEMO_LIMIT, DEMO_SUITE, Listing, only_one, print_rows
from vlmbench.errors import UsageError


class Kind(StrEnum):
    methods = "methods"
    suites = "suites"
    models = "models"


class BenchOp(StrEnum):
    attention = "attention"
    prefill = "prefill"
    decode = "decode"
    vision = "vision"


class Checked(StrEnum):
    contract = "contract"
    invariance = "invariance"


def list_(
    kind: Annotated[Kind | None, typer.Argument(help="Default: all three.")] = None,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
) -> int:
    """Name the methods, suites and models that are there."""
    rows = [row for each in ([kind] if kind else Kind) for row in _names(each)]
    if format is Listing.json:
        print_rows(rows)
        return 0
    width = max(len(row["name"]) for row in rows) if rows else 0
    heading = None
    for row in rows:
        if row["kind"] != heading and kind is None:
            print(f"{row['kind']}s")
        heading = row["kind"]
        print(f"  {row['name']:<{width}}  {row['summary']}".rstrip())
    return 0


def check(
    what: Annotated[
        Checked, typer.Argument(help="contract: what every method promises; invariance: answers that flip.")
    ],
    model: Annotated[str | None, typer.Option(metavar="SPEC", help="Default: the suite's own.")] = None,
    method: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="The method. Default: full.")] = None,
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
        methods=(only_one(method or ["full"]),),
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
            print_rows([each._asdict() for each in checks])
        else:
            print(check_contract.to_markdown(checks).rstrip("\n"))
        return int(any(each.ok is False for each in checks))
    from vlmbench import check_invariance

    with Progress() as progress:
        rows = list(check_invariance.check(request, progress, only))
    if format is Listing.json:
        print_rows([row._asdict() for row in rows])
    else:
        print(check_invariance.to_markdown(rows).rstrip("\n"))
    return 0


def bench(
    op: Annotated[BenchOp, typer.Argument(help="What is timed.")],
    method: Annotated[
        list[str], typer.Option(metavar="SPEC", help="The method whose operation is timed. Repeat it for a row each.")
    ],
    frames: Annotated[int, typer.Option(help="Temporal units of the made-up video.")] = 64,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    text_tokens: Annotated[int, typer.Option(help="Of the prompt, most of them behind the video.")] = 74,
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
    rivals: Annotated[
        bool, typer.Option("--rivals", help="attention: time every other kernel for the same pairs too.")
    ] = False,
    memory_gb: Annotated[
        float | None,
        typer.Option(help="decode: of the card; FFNs stay on the host, dense ones stream (a row each way)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the device's.")] = None,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Time one operation of a method, or a stage of a model with it, against the best dense kernel, in turns."""
    from vlmbench import bench as benches
    from vlmbench.header import measured_on

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
        text_tokens=text_tokens,
    )
    options: dict[str, Any] = {"device": device, "dtype": dtype, "rounds": rounds, "steps": steps}
    if memory_gb is not None:
        if op != BenchOp.decode or check or rivals or layers:
            raise UsageError(
                "--memory-gb is for the whole model in bench decode; leave it or --check, --rivals, --layers out."
            )
        found = [benches.bench_offload(one, each, memory_gb=memory_gb, **options) for each in sizes for one in method]
        rows = [row for both in found for row in both.values()]
    else:
        options |= {"check": check, "layers": layers, "rivals": rivals}
        rows = [benches.bench(op, one, each, **options) for each in sizes for one in method]
    if format is Listing.json:
        print_rows(rows, measured_on())
    else:
        print(benches.to_text(rows))
    return 0


def plan(
    model: Annotated[str, typer.Option(metavar="SPEC", help="A preset, a shipped model, a folder or a hub id.")],
    device: Annotated[str, typer.Option(metavar="CARD", help="h200, h100, a100-80g, a100-40g, l40s or 4090.")],
    method: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="Repeat it for more. Default: full.")] = None,
    frames: Annotated[int, typer.Option(help="Temporal units of the video (Qwen-VL: pairs of frames).")] = 64,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of each; a fixed-size tower has its own number.")] = 256,
    text_tokens: Annotated[int, typer.Option(help="Of the prompt, most of them behind the video.")] = 74,
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

    methods = make_methods(method or ["full"])
    kind = pick_dtype(dtype, pick_device("cpu"))
    sizes = shapes(tokens=tokens, frames=frames, frame_tokens=frame_tokens, text_tokens=text_tokens, preset=None)
    planned = [plans.plan(model, one, each, device, kind, max_new_tokens) for each in sizes for one in methods]
    if format is Listing.json:
        print_rows([row for rows in planned for row in rows])
    else:
        print("\n".join(plans.to_text(rows) for rows in planned))
    return 0


def doctor(
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    out: Annotated[Path, typer.Option(help="Results folder whose disk is looked at.")] = Path("runs"),
) -> int:
    """Show what works on this machine."""
    from vlmbench import doctor as checks

    rows = checks.rows(out)
    if format is Listing.json:
        print_rows(rows)
    else:
        print(checks.to_text(rows))
    return 0


def _names(kind: Kind) -> Iterable[dict[str, str]]:
    if kind is Kind.models:
        from vlmbench.models import catalogue

        pairs = catalogue.names()
    else:
        from vlmbench import registry

        known = {Kind.methods: registry.methods, Kind.suites: registry.suites}[kind]
        pairs = [(name, known.summary(name)) for name in known.names()]
    return [{"kind": kind.removesuffix("s"), "name": name, "summary": summary} for name, summary in pairs]
