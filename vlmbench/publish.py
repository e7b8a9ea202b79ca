"""Committed tables out of committed results: ``python -m vlmbench.publish`` (``make tables``).

The README's table, and a ``bench.md`` beside the bench rows of every machine in ``results/``. ``--check`` writes nothing
and fails when a text is not what the results say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmbench import header
from vlmbench.spec import joined

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
    name = row["method"] if row["method"] == "prior" else joined(row["method"], row["params"] or "")
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


BENCH_HEAD = (
    "| workload | op | method | shape | tokens | dense kernel | dense, s | method, s | × | at most | share of it "
    "| matrix rate | bandwidth | peak, GiB | marks |"
)
BENCH_NOTE = (
    "Medians of interleaved rounds; × is dense over method (above 1 is faster) with its 95 % interval. `at most` is dense "
    "over the method's: pairs in attention, bytes read in decode, FLOPs elsewhere; `share of it` is the ratio over that. "
    "`matrix rate` and `bandwidth` are the method's shares of what the device reached on a large product and a large copy. "
    "Empty cells were not measured. Every column: [how we time](../../docs/how-we-time.md)."
)


def bench_rows(folder: Path) -> list[tuple[str, Row]]:
    """(workload, row with a `source` in words) of every bench result in a machine's folder; smoke rows are no results."""
    found: list[tuple[str, Row]] = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = data.get("rows", []) if isinstance(data, dict) else []
        if rows and "op" in rows[0] and "dense_s" in rows[0]:
            found += [(path.stem, {**row, "source": header.said(data)}) for row in rows]
    for path in sorted(folder.glob("rows*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found += [(row["workload"], {**row, "source": row.get("commit") and f"commit {row['commit']}"}) for row in rows]
    return [(name, row) for name, row in found if "smoke" not in (row.get("marks") or [])]


def bench_table(rows: Sequence[tuple[str, Row]]) -> str:
    """A Markdown table of bench rows. Rows from before a column existed leave its cell empty."""
    rule = "| --- | --- | --- | --- | ---: | --- |" + " ---: |" * 8 + " --- |"
    machines = dict.fromkeys(f"{row['device']}, {row['dtype']}" for _, row in rows)
    lines = [f"Measured on {'; '.join(machines)}. {_sources(rows)}"]
    lines += ["", BENCH_HEAD, rule, *(_bench_line(*each) for each in rows)]
    return "\n".join([*lines, "", BENCH_NOTE, *_said_of_rows(rows)])


def _said_of_rows(rows: Sequence[tuple[str, Row]]) -> Iterable[str]:
    """Other kernels for the same pairs, and what a row's note says, as lists."""
    rivals = [
        f"- {name}: {', '.join(f'{way} {seconds:.4g} s' for way, seconds in row['method_kernels_s'].items())}"
        for name, row in rows
        if row.get("method_kernels_s")
    ]
    notes = [f"- {name}: {row['note']}" for name, row in rows if row.get("note")]
    if rivals:
        yield from ("", "Every way to compute the same pairs, medians in turns:", "", *rivals)
    if notes:
        yield from ("", "Notes:", "", *notes)


def _sources(rows: Sequence[tuple[str, Row]]) -> str:
    """What the rows say of the machine, the versions and the commit that measured them; which rows, where they differ."""
    found: dict[str, list[str]] = {}
    for name, row in rows:
        names = found.setdefault(row.get("source") or "commit and versions not noted", [])
        names += [name] if name not in names else []
    if len(found) == 1:
        (words,) = found
        return f"{words[0].upper()}{words[1:]}."
    each = (f"{words} ({', '.join(names)})" for words, names in found.items())
    return f"Rows by their source: {'; '.join(each)}."


def _bench_line(name: str, row: Row) -> str:
    limit = row.get({"attention": "pairs_limit", "decode": "bytes_limit"}.get(row["op"], "flops_limit"))
    share = row["ratio"] / limit if limit and row["ratio"] is not None else None
    layers = f", {row['layers']} of {row['model_layers']} layers" if row.get("layers") and row["per_layer"] else ""
    ratio = _show(row["ratio"], "{:.2f}")
    if row["ratio_low"] is not None:
        ratio += f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    params = ",".join(f"{key}={value}" for key, value in row["params"].items() if value is not None)
    cells = [
        name,
        row["op"],
        f"`{row['method']}{':' if params else ''}{params}`",
        (row["shape"] or f"{row['heads']}/{row['kv_heads']} heads of {row['head_dim']}") + layers,
        str(row["tokens"]),
        row["dense_kernel"] or "—",
        _show(row["dense_s"], "{:.4g}"),
        _show(row["method_s"], "{:.4g}"),
        ratio,
        _show(limit, "{:.2f}"),
        _show(share, "{:.2f}"),
        _show(row.get("flops_share"), "{:.0%}"),
        _show(row.get("bytes_share"), "{:.0%}"),
        _show(row["peak_bytes"], "{:.2f}", 2**30),
        ", ".join(row.get("marks") or (["cpu"] if row["device"] == "cpu" else [])) or "—",
    ]
    return f"| {' | '.join(cells)} |"


def machine_texts(root: Path) -> dict[Path, str]:
    """``bench.md`` of every machine with bench rows, and the report beside every study's rows, as they should read."""
    from vlmbench import claims_text, density, gate_study, memvp_text, methods_text, needles_text
    from vlmbench.reference import discrimination

    reports = {
        "pevlm": claims_text,
        "kernels": density,
        "memvp": memvp_text,
        "mminference": needles_text,
        "methods": methods_text,
        "discrimination": discrimination,
        "gate": gate_study,
    }
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if rows := bench_rows(folder):
            title = f"# Bench rows on {folder.name}\n\n{_versions(folder)}"
            found[folder / "bench.md"] = f"{title}{bench_table(rows)}\n"
        if curves := density.of_bench(row for name, row in rows if name.startswith("gpu-")):
            found[folder / "kernels.md"] = density.to_markdown({"file": "rows.jsonl", "rows": curves})
        for name, text in reports.items():
            if (rows_of := folder / f"{name}.json").exists():
                found[folder / f"{name}.md"] = text.to_markdown(json.loads(rows_of.read_text(encoding="utf-8")))
    return found


def _versions(folder: Path) -> str:
    """What `make bench-gpu` wrote about the machine, as a line."""
    path = folder / "machine.json"
    if not path.exists():
        return ""
    facts = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("python", "torch", "triton", "transformers") if facts[name]
    )
    reached = f"{facts['device_flops'] / 1e12:.0f} TFLOP/s and {facts['device_bytes_per_s'] / 1e12:.2f} TB/s reached"
    return f"{facts['device']}: {versions}; {reached}.\n\n"


def main(
    results: Annotated[Path, typer.Option(help="What `vlmbench table --format json` wrote.")] = Path(
        "results/cpu/demo.json"
    ),
    readme: Annotated[Path, typer.Option(help="The text with the markers.")] = Path("README.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when the text is out of date.")] = False,
) -> None:
    """Put the committed results into the README and beside the rows of every machine."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    texts = {readme: insert(readme.read_text(encoding="utf-8"), results.stem, table(rows))}
    texts |= machine_texts(results.parents[1])
    for path, fresh in texts.items():
        if not check:
            path.write_text(fresh, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != fresh:
            typer.echo(f"{path} does not show what is committed in {results.parents[1]}; run make tables.", err=True)
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
