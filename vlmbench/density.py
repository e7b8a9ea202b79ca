"""Time against density for every sparse pattern, and where it breaks even: ``python -m vlmbench.density``.

One layer's attention is timed against the best dense kernel in turns, as `vlmbench bench attention` does, the index
included. A pattern's density is set by `budget`, which multiplies its published sizes; a ratio at one of them would say
nothing about the others. The report is `kernels.md` (``python -m vlmbench.publish``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from vlmbench import bench, header
from vlmbench.errors import RunError, UsageError
from vlmbench.files import write_json
from vlmbench.machine import pick_device, pick_dtype
from vlmbench.madeup import shapes

Row = Mapping[str, Any]
PATTERNS = ("a_shape", "grid", "vs", "mix")
BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0)
SAME = 0.001
"""Densities that are closer than this are one: a pattern that holds all pairs has no larger budget."""
COLUMNS = (
    *("pattern", "budget", "tokens", "density", "time", "time_low", "time_high", "ratio", "share", "dense_kernel"),
    *(
        "dense_s",
        "method_s",
        "shape",
        "heads",
        "kv_heads",
        "head_dim",
        "frame_tokens",
        "dtype",
        "device",
        "rounds",
        "marks",
    ),
)


class BreakEven(NamedTuple):
    """Where a pattern takes as long as dense attention, and which side of it is faster."""

    at: float | None
    """None where that was not crossed."""
    faster: str
    """"up to" or "from" there; else "everywhere", "nowhere" or "untimed"."""


def row(timed: Row, pattern: str, budget: float) -> dict[str, Any]:
    """A row of the curve from a row of `bench`: `density` is pairs over dense pairs, `time` seconds over dense seconds.

    `share` is how much of what its pairs allow a pattern reaches: 1 if every pair took as long as a dense one.
    """
    density = None if timed["pairs_limit"] is None else 1 / timed["pairs_limit"]
    found: dict[str, Any] = {name: timed.get(name) for name in COLUMNS}
    low, high = timed["ratio_low"], timed["ratio_high"]
    ratio = timed["ratio"]
    return found | {
        "pattern": pattern,
        "budget": budget,
        "density": density,
        "time": None if ratio is None else 1 / ratio,
        "time_low": None if high is None else 1 / high,
        "time_high": None if low is None else 1 / low,
        "share": None if ratio is None or density is None else ratio * density,
        "rounds": len(timed["dense_rounds_s"]),
        "marks": list(timed["marks"]),
    }


def of_bench(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows of the curves from those rows of `bench` that are points of one, sorted by pattern, length and budget."""
    found = []
    for timed in rows:
        params = timed["params"] or {}
        if timed["op"] == "attention" and params.get("pattern") in PATTERNS and params.get("boundary") == "none":
            found.append(row(timed, params["pattern"], params["budget"]))
    return sorted(found, key=lambda each: (PATTERNS.index(each["pattern"]), each["tokens"], each["budget"]))


def densest(rows: Iterable[Row]) -> BreakEven:
    """Of one pattern and length: the density up to which it is faster, straight between what was timed."""
    return _crossing(rows, "density", float)


def shortest(rows: Iterable[Row]) -> BreakEven:
    """Of one pattern and budget: the length in tokens from which it is faster, straight in the logarithm of both."""
    return _crossing(rows, "tokens", math.log)


def _crossing(rows: Iterable[Row], over: str, scale: Callable[[float], float]) -> BreakEven:
    known = [each for each in rows if each["time"] is not None and each[over] is not None]
    points = sorted((scale(each[over]), math.log(each["time"])) for each in known)
    if not points:
        return BreakEven(None, "untimed")
    if all(time <= 0 for _, time in points):
        return BreakEven(None, "everywhere")
    if all(time > 0 for _, time in points):
        return BreakEven(None, "nowhere")
    # Of several the first density and the last length: a curve that goes back and forth has no gain to promise between.
    pairs = [each for each in pairwise(points) if (each[0][1] <= 0) != (each[1][1] <= 0)]
    (x0, t0), (x1, t1) = pairs[-1] if over == "tokens" else pairs[0]
    at = x0 + (x1 - x0) * t0 / (t0 - t1)
    return BreakEven(math.exp(at) if scale is math.log else at, "up to" if t0 <= 0 else "from")


def to_markdown(data: Mapping[str, Any]) -> str:
    """The report; every number is read from the rows, and rehearsals give none."""
    rows = [each for each in data["rows"] if "smoke" not in each["marks"]]
    lines = [
        "# Sparse patterns: time against density",
        "",
        f"Written from `{data.get('file', 'kernels.json')}` by `python -m vlmbench.publish`; do not edit. One layer's "
        "attention with its index, over the best dense kernel of the machine, in interleaved rounds; brackets are 95 % "
        "intervals, which fewer than six rounds do not give. *Density* is the pairs that a pattern allows over dense causal "
        "pairs, *time* its seconds over dense ones (below 1 is faster), and *reached* the ratio over what the pairs allow. "
        "Queries and keys hold planted lines, columns and diagonals.",
    ]
    if not rows:
        return "\n".join([*lines, "", "Nothing was timed.", ""])
    first = rows[0]
    said = f"{first['device']}, {first['dtype']}, {first['heads']} heads, {first['kv_heads']} key heads of {first['head_dim']}"
    said += f", {first['rounds']} rounds"
    lines += ["", f"{', '.join(filter(None, (said, header.said(data))))}."]
    for pattern in dict.fromkeys(each["pattern"] for each in rows):
        own = [each for each in rows if each["pattern"] == pattern]
        lines += ["", f"## {pattern}", "", "| tokens | budget | density | time | faster × | reached | marks |"]
        lines += ["| ---: | ---: | ---: | ---: | ---: | ---: | --- |", *map(_line, own), ""]
        for tokens in dict.fromkeys(each["tokens"] for each in own):
            lines.append(f"- {tokens} tokens: {_said(densest(e for e in own if e['tokens'] == tokens), 'density')}")
        for budget in dict.fromkeys(each["budget"] for each in own):
            said = _said(shortest(each for each in own if each["budget"] == budget), "tokens")
            lines.append(f"- budget {budget:g}: {said}")
    return "\n".join([*lines, ""])


def _said(found: BreakEven, over: str) -> str:
    if found.at is None:
        if found.faster == "untimed":
            return "not timed"
        return f"faster at {'everything' if found.faster == 'everywhere' else 'nothing'} that was timed"
    return f"faster {found.faster} " + (
        f"a density of {found.at:.2f}" if over == "density" else f"{found.at:,.0f} tokens"
    )


def _line(row: Row) -> str:
    def shown(value: float | None, form: str = "{:.3f}") -> str:
        return "—" if value is None else form.format(value)

    time = shown(row["time"])
    if row["time_low"] is not None:
        time += f" [{row['time_low']:.3f}, {row['time_high']:.3f}]"
    cells = (str(row["tokens"]), f"{row['budget']:g}", shown(row["density"]), time, shown(row["ratio"], "{:.2f}"))
    return f"| {' | '.join((*cells, shown(row['share'], '{:.2f}'), ', '.join(row['marks']) or '—'))} |"


def curve(pattern: str, budgets: Sequence[float], shape: Any, timed: Callable[[str], Row]) -> list[dict[str, Any]]:
    """Rows of one pattern and length; `timed` gives a bench row of a spec. A budget that adds no pairs is left out."""
    found: list[dict[str, Any]] = []
    for budget in sorted(budgets):
        each = row(timed(f"mminference:pattern={pattern},budget={budget:g}"), pattern, budget)
        known = [other["density"] for other in found if other["density"] is not None]
        if each["density"] is not None and known and each["density"] - max(known) < SAME:
            continue
        found.append(each | {"frame_tokens": shape.frame_tokens})
    return found


def main(
    out: Annotated[Path | None, typer.Option(help="Write the rows there as JSON.")] = None,
    pattern: Annotated[str, typer.Option(help="Patterns with / between them.")] = "/".join(PATTERNS),
    tokens: Annotated[str, typer.Option(help="Prompt lengths with / between them.")] = "4096/16384",
    budget: Annotated[str, typer.Option(help="Factors on published sizes, with / between them.")] = "0.25/0.5/1/2/4",
    frame_tokens: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 128,
    rounds: int = 5,
    device: str | None = None,
    dtype: str | None = None,
    smoke: Annotated[bool, typer.Option(help="A rehearsal: rows carry the mark smoke and give no figure.")] = False,
) -> None:
    """Time every pattern at every length and budget; JSON on standard output, one line a row on standard error."""
    patterns = pattern.split("/")
    if unknown := [each for each in patterns if each not in PATTERNS]:
        raise SystemExit(f"--pattern must be of {', '.join(PATTERNS)}, not {unknown[0]!r}.")
    try:
        budgets = [float(each) for each in budget.split("/")]
    except ValueError:
        raise SystemExit(f"--budget must be numbers above 0 with / between them, not {budget!r}.") from None
    if min(budgets) <= 0:
        raise SystemExit(f"--budget must be numbers above 0 with / between them, not {budget!r}.")
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {"schema": 1, **header.measured_on(), "rows": rows}
    try:
        on = pick_device(device)
        data["dtype"] = str(pick_dtype(dtype, on))
        wanted = shapes(
            tokens=tokens,
            frames=1,
            frame_tokens=frame_tokens,
            preset=None,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )
        for shape in wanted:
            for name in patterns:

                def timed(spec: str, shape: Any = shape) -> Row:
                    return bench.bench(
                        "attention", spec, shape, device=on.type, dtype=dtype, rounds=rounds, check=smoke
                    )

                for each in curve(name, budgets, shape, timed):
                    if smoke:
                        each["marks"] = [*each["marks"], "smoke"]
                    rows.append(each)
                    typer.echo(_line(each), err=True)
                if out is not None:  # after every curve: what was timed is kept whatever the next one comes to
                    write_json(out, data)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
    typer.echo(json.dumps(data, indent=1))


if __name__ == "__main__":
    typer.run(main)
