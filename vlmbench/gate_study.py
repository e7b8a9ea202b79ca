"""How often the gate is wrong: repeats of unchanged code, and of one method that was really made slower.

``python -m vlmbench.gate_study --out results/cpu/gate.md`` does what `docs/ci/gate.yml` does, again and again: times more
videos until the gate decides. First it writes a baseline. Then come repeats of unchanged code, of which none may fail, in
turns with repeats in which the method spends a quarter more time in every stage of the model, of which nearly all must.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

import typer

from vlmbench import gate as gates
from vlmbench.files import write_json
from vlmbench.header import cpu_name, measured_on, said
from vlmbench.request import RunRequest

if TYPE_CHECKING:
    from vlmbench.backend import Backend
    from vlmbench.method import Method

STAGES = ("inputs", "encode_vision", "splice", "prefill", "decode")
"""Steps of the adapter that the planted method makes slower: all of `e2e_s` but reading the video."""
TIMED = (8, 16, 32, 64)
"""Videos of each round, as in docs/ci/gate.yml."""


@dataclass(frozen=True)
class Repeat:
    """One gate run."""

    planted: bool
    verdict: str
    videos: int
    ratio: tuple[float, float | None, float | None]
    seconds: float


def slowed(method: Method, factor: float) -> Method:
    """The method under its own name and parameters, taking `factor` times as long on purpose."""
    base = type(method)

    def install(self: Method, patch: Any, trace: Any) -> None:
        base.install(self, patch, trace)
        for name in STAGES:
            patch.attr(patch.adapter, name, _longer(getattr(patch.adapter, name), factor))

    planted = type(base.__name__, (base,), {"install": install, "__module__": __name__})
    found: Method = object.__new__(planted)
    found.__dict__.update(method.__dict__)
    return found


def _longer(call: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def longer(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        until = begin + factor * (time.perf_counter() - begin)
        while time.perf_counter() < until:
            pass
        return result

    return longer


def repeat(request: RunRequest, backend: Backend, baseline: Path, factor: float | None) -> Repeat:
    """Time in a fresh folder until the gate decides or the videos are used up; with a `factor` the method is slowed."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        own = replace(request, out=Path(folder))
        judged: list[gates.Judged] = []
        for timed in TIMED:
            measure(replace(own, timed=timed), backend, factor)
            judged, _ = gates.gate(own.out, baseline=baseline)
            if gates.overall(judged) != "inconclusive":
                break
    (one,) = judged
    seconds = time.monotonic() - begin
    return Repeat(factor is not None, gates.overall(judged), timed, tuple(one.estimate), seconds)  # type: ignore[arg-type]


def measure(request: RunRequest, backend: Backend, factor: float | None = None) -> None:
    """The latency pass of ``vlmbench run``, which goes on where it stopped."""
    from vlmbench import session as sessions
    from vlmbench.progress import Progress
    from vlmbench.runner import latency

    make = sessions.make_methods

    def planted(texts: Any) -> list[Method]:
        return [method if method.name == "full" else slowed(method, factor or 1.0) for method in make(texts)]

    with (
        Progress() as progress,
        mock.patch.object(sessions, "make_methods", planted if factor else make),
        sessions.Session(request, progress, backend=backend) as session,
    ):
        latency(session)


def to_markdown(data: Mapping[str, Any]) -> str:
    """What was found, then every repeat, from what `main` wrote."""
    repeats, floor = [Repeat(**{**row, "ratio": tuple(row["ratio"])}) for row in data["rows"]], data["floor"]
    unchanged, planted = ([each for each in repeats if each.planted == kind] for kind in (False, True))
    failed, caught = (sum(each.verdict == "fail" for each in side) for side in (unchanged, planted))
    lines = [
        "# How often the gate is wrong",
        "",
        f"{data['said']} {_source(data)}",
        "",
        f"- unchanged code: {failed} of {len(unchanged)} failed, "
        f"{sum(each.verdict == 'inconclusive' for each in unchanged)} inconclusive",
        f"- a planted slow-down: {caught} of {len(planted)} caught, "
        f"{sum(each.verdict == 'inconclusive' for each in planted)} inconclusive",
        "",
        f"| repeat | code | verdict | end to end ×, floor {floor:.3f} | videos | s |",
        "| ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for number, each in enumerate(repeats, start=1):
        value, low, high = each.ratio
        shown = f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
        code = "slowed" if each.planted else "unchanged"
        lines.append(f"| {number} | {code} | {each.verdict} | {shown} | {each.videos} | {each.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _source(data: Mapping[str, Any]) -> str:
    """Of a record from before these were written: that they are missing."""
    if data.get("commit"):
        return f"Measured on {said(data)}."
    return f"Measured on {said(data)}; commit not recorded." if said(data) else "Versions and commit not recorded."


def main(
    out: Annotated[Path, typer.Option(help="The record.")] = Path("results/cpu/gate.md"),
    method: Annotated[str, typer.Option(help="The method that is gated.")] = "uniform:ratio=0.5",
    repeats: Annotated[int, typer.Option(help="Of unchanged code, and as many of slowed.")] = 20,
    slowdown: Annotated[float, typer.Option(help="Share of time that is added.")] = 0.25,
    suite: Annotated[str, typer.Option(help="Its videos are timed.")] = "synthvideo:length=32",
    model: Annotated[str, typer.Option(help="A real model.")] = "tiny-llava-ov",
    rounds: Annotated[int, typer.Option(help="Latency rounds of each video.")] = 5,
) -> None:
    """Write a baseline, then gate unchanged and slowed code in turns, and record every verdict."""
    from vlmbench.machine import load_backend

    request = RunRequest(methods=(method,), model=model, suite=suite, mode="latency", repeats=rounds)
    backend = load_backend(request, model)
    with tempfile.TemporaryDirectory() as folder:
        baseline = Path(folder) / "gate.json"
        first = replace(request, out=Path(folder) / "runs", timed=TIMED[-1])
        measure(first, backend)
        gates.gate(first.out, baseline=baseline, update=True)
        (row,) = gates.Baseline.read(baseline).rows
        floor = row.floors["speedup_e2e"]
        found: list[Repeat] = []
        for _ in range(repeats):
            for factor in (None, 1 + slowdown):
                found.append(repeat(request, backend, baseline, factor))
                typer.echo(f"{found[-1]}", err=True)
    asked = (
        f"`{method}` on {suite} with {model}, {rounds} rounds a video, on {cpu_name()}; the baseline is of {TIMED[-1]} videos "
        f"and 10 % below what they reached; slowed: {slowdown:.0%} more time in every stage of the model. "
        f"`python -m vlmbench.gate_study`."
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**each.__dict__, "ratio": list(each.ratio)} for each in found]
    data = {"schema": 1, **measured_on(), "said": asked, "floor": floor, "rows": rows}
    out.write_text(to_markdown(data), encoding="utf-8")
    write_json(out.with_suffix(".json"), data)


if __name__ == "__main__":
    typer.run(main)
