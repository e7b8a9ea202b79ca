"""The README's table out of a committed results file: ``python -m vlmbench.publish`` (``make tables``).

``--check`` writes nothing and fails when the text is not what the results say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Row = Mapping[str, Any]

HEAD = "| method | visual tokens | accuracy | against full | same answer | prefill × | end to end × | KV, MiB | marks |"


def table(rows: Sequence[Row]) -> str:
    """A short Markdown table of comparable rows, and the line that says what they were measured on."""
    first = rows[0]
    lines = [HEAD, "| --- |" + " ---: |" * (HEAD.count("|") - 3) + " --- |"]
    lines += [_line(row) for row in rows]
    lines += [
        "",
        f"{first['model']} on {first['suite']}, {first['n']} questions; {first['device']}, {first['dtype']}, attention "
        f"{first['attention_kernel']}. Accuracy with its 95 % interval clustered by video; × is the speed-up over full "
        "attention in interleaved rounds (above 1 is faster), `≤` its Amdahl bound where one is known.",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    name = f"{row['method']}:{row['params']}" if row["params"] and row["method"] != "prior" else row["method"]
    cells = [
        f"`{name}`",
        _show(row["n_visual_tokens"], "{:.0f}"),
        _with_interval(row, "accuracy", "{:.2f}"),
        _with_interval(row, "accuracy_delta", "{:+.2f}"),
        _show(row["agreement"], "{:.2f}"),
        _speedup(row, "prefill"),
        _speedup(row, "e2e"),
        _show(row["kv_bytes"], "{:.2f}", 2**20),
        ", ".join(row["marks"]) or "—",
    ]
    return f"| {' | '.join(cells)} |"


def _show(value: float | None, form: str, unit: float = 1) -> str:
    return "—" if value is None else form.format(value / unit)


def _with_interval(row: Row, name: str, form: str) -> str:
    if row[name] is None:
        return "—"
    low, high = (form.format(row[f"{name}_{end}"]) for end in ("low", "high"))
    return f"{form.format(row[name])} [{low}, {high}]"


def _speedup(row: Row, span: str) -> str:
    text = _show(row[f"speedup_{span}"], "{:.2f}")
    bound = row.get(f"amdahl_{span}")
    return f"{text} (≤ {bound:.2f})" if bound is not None and text != "—" else text


def insert(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced. Raises `ValueError` when they are not there."""
    begin, end = f"<!-- table {name} -->", "<!-- end -->"
    found = re.subn(
        f"{re.escape(begin)}\n.*?{re.escape(end)}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL
    )
    if found[1] != 1:
        raise ValueError(f"the markers {begin} … {end} must stand in the text once, not {found[1]} times")
    return found[0]


def main(
    results: Annotated[Path, typer.Option(help="What `vlmbench table --format json` wrote.")] = Path(
        "results/cpu/demo.json"
    ),
    readme: Annotated[Path, typer.Option(help="The text with the markers.")] = Path("README.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when the text is out of date.")] = False,
) -> None:
    """Put the committed results into the README."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    text = readme.read_text(encoding="utf-8")
    fresh = insert(text, results.stem, table(rows))
    if check and fresh != text:
        typer.echo(f"{readme} does not show what {results} says; run make tables.", err=True)
        raise typer.Exit(1)
    if not check:
        readme.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
