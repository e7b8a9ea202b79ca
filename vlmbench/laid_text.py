"""How a laid out table is written: Markdown, CSV, JSON and LaTeX, with the same figures in all four."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from vlmbench import plain
from vlmbench.errors import UsageError
from vlmbench.laid_out import Cell, Column, Line, Table
from vlmbench.record import SCHEMA
from vlmbench.spec import Spec, joined, parse
from vlmbench.tables import method_text

PREAMBLE = r"% needs \usepackage{booktabs,multirow,graphicx} and \usepackage[table]{xcolor}"
WIDE = 6
"""Columns above which a table spans both columns of a paper, as its class knows, with less room between them."""


def to_markdown(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        rows = [["method", *(_head(column) for column in table.columns)], ["---", *["---:"] * len(table.columns)]]
        for band in table.bands:
            if band.title:
                rows.append([f"**{plain.cell(band.title)}**", *[""] * len(table.columns)])
            for line in band.lines:
                name = method_text({"method": line.method, "params": line.params})
                rows.append([name + _marks(line), *(_markdown_cell(line, column) for column in table.columns)])
        title = f"**{plain.cell(table.title)}**" + (f" ({plain.cell(table.split)})" if table.split else "")
        parts += [title, "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        parts.append("\n".join(f"- {plain.note(note)}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _markdown_cell(line: Line, column: Column) -> str:
    text = column.shown(line.cells[column.key])
    if column.key in line.best:
        return f"**{text}**"
    return f"<u>{text}</u>" if column.key in line.second else text


def _head(column: Column) -> str:
    return plain.cell(f"{column.group}, {column.head}" if column.group else column.head)


def _marks(line: Line) -> str:
    return f" ({', '.join(line.marks)})" if line.marks else ""


def to_csv(tables: Sequence[Table]) -> str:
    """One line a method, unscaled and unrounded; what ran out of memory is OOM, and what is not known is empty."""
    rows = _rows(tables)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("best", "second", "oom")))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        texts = {**row, "marks": " ".join(row["marks"]), **dict.fromkeys(row["oom"], "OOM")}
        writer.writerow({name: plain.spreadsheet(value) for name, value in texts.items()})
    return out.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """``{"schema": 1, "layout", "columns", "notes", "rows"}``, see docs/schema/layout.schema.json."""
    columns: dict[str, dict[str, Any]] = {}
    for table in tables:
        for each in table.columns:
            columns[each.key] = {"key": each.key, "head": each.head, "group": each.group, "scale": each.scale}
    data = {
        "schema": SCHEMA,
        "layout": tables[0].layout,
        "columns": list(columns.values()),
        "notes": list(dict.fromkeys(note for table in tables for note in table.notes)),
        "rows": _rows(tables),
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _rows(tables: Sequence[Table]) -> list[dict[str, Any]]:
    with_interval = {
        column.key
        for table in tables
        for column in table.columns
        if any(line.cells[column.key].low is not None for band in table.bands for line in band.lines)
    }
    found = []
    for table in tables:
        for band in table.bands:
            for line in band.lines:
                row: dict[str, Any] = {"table": table.title, "split": table.split, "band": band.title}
                row |= {"method": line.method, "params": line.params, "trained": line.trained, "marks": [*line.marks]}
                for column in table.columns:
                    cell = line.cells[column.key]
                    row[column.key] = cell.value
                    if column.key in with_interval:
                        row |= {f"{column.key}_low": cell.low, f"{column.key}_high": cell.high}
                shown = [column.key for column in table.columns if line.cells[column.key].oom]
                found.append(row | {"best": line.best, "second": line.second, "oom": shown})
    return found


_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \textquotedbl needs another font encoding than LaTeX begins with
    "×": r"$\times$",
    "·": r"$\cdot$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "−": r"\textminus{}",
    "²": r"\texttwosuperior{}",
    "µ": r"$\mu$",
    "°": r"\textdegree{}",
    "–": "--",
    "’": "'",
    "±": r"$\pm$",
    "—": "---",
    "…": r"\dots{}",
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it is, in whatever font encoding; control characters are dropped.

    A character that LaTeX refuses to print (``! LaTeX Error: Unicode character``) stands there by its number.
    """
    return "".join(
        _LATEX.get(char) or (char if _known(char) else f"[U+{ord(char):04X}]") for char in text if char.isprintable()
    )


def _known(char: str) -> bool:
    """ASCII, and the letters of Latin-1 but for the Icelandic ones, for which LaTeX's first encoding has no signs."""
    return char.isascii() or ("À" <= char <= "ÿ" and char not in "ÐÞðþ×÷")


def to_latex(tables: Sequence[Table]) -> str:
    """A ``table`` float for each, with booktabs rules, and the notes below the rules.

    What is wider than the line is shrunk to it: only LaTeX knows how wide a paper's line is. So that little is, a method is
    printed by its name, with what tells it from others of that name, and its parameters stand in the first note.
    """
    return PREAMBLE + "\n" + "\n".join(_latex(table) for table in tables)


def _latex(table: Table) -> str:
    columns = table.columns
    names = short_names([line for band in table.bands for line in band.lines])
    title = escape(table.title) + (f" ({escape(table.split)})" if table.split else "")
    wide = len(columns) > WIDE
    kind = "table*" if wide else "table"
    lines = [f"\\begin{{{kind}}}", r"\centering", r"\small", *([r"\setlength{\tabcolsep}{3pt}"] if wide else [])]
    lines.append(f"\\caption{{{title}.}}")
    lines += [f"\\sbox0{{\\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", *_latex_head(columns), r"\midrule"]
    for number, band in enumerate(table.bands):
        if number:
            lines.append(r"\midrule")
        if band.title:
            width = len(columns) + 1
            lines.append(f"\\rowcolor{{gray!15}}\\multicolumn{{{width}}}{{c}}{{{escape(band.title)}}} \\\\")
        for line in band.lines:
            name = escape(names[joined(line.method, line.params)] + _marks(line))
            lines.append(" & ".join([name, *(_latex_cell(line, column) for column in columns)]) + r" \\")
    fitted = r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
    lines += [r"\bottomrule", r"\end{tabular}}" + fitted, r"\par\smallskip"]
    spelt = [spec for spec, short in names.items() if short != spec]
    said = [f"in full: {'; '.join(spelt)}", *table.notes] if spelt else table.notes
    notes = " ".join(f"{breakable(note)}." for note in said)
    lines.append(f"\\begin{{minipage}}{{\\linewidth}}\\footnotesize\\raggedright {notes}\\end{{minipage}}")
    lines.append(f"\\end{{{kind}}}")
    return "\n".join(lines) + "\n"


def short_names(lines: Sequence[Line]) -> dict[str, str]:
    """Spec of a line -> its method's name, with those of its parameters in which lines of one name differ."""
    try:
        params = {(line.method, line.params): parse(f"m:{line.params}").params for line in lines}
    except UsageError:  # a header that nobody typed
        return {joined(line.method, line.params): joined(line.method, line.params) for line in lines}
    found: dict[str, str] = {}
    for (method, text), own in params.items():
        others = [other for (name, _), other in params.items() if name == method]
        differ = {key: value for key, value in own.items() if any(other.get(key) != value for other in others)}
        found[joined(method, text)] = joined(method, str(Spec("", differ)).lstrip(":"))
    return found


def breakable(text: str) -> str:
    """Escaped text of a note, which may end a line behind a comma: a spec of many parameters is one word else."""
    return escape(text).replace(",", r",\allowbreak ").replace(r",\allowbreak  ", ", ")


def _latex_head(columns: Sequence[Column]) -> list[str]:
    """One line, or two where columns share a heading; those without one then span both."""
    if not any(column.group for column in columns):
        return [" & ".join(["Method", *(escape(column.head) for column in columns)]) + r" \\"]
    above, below, rules = [r"\multirow{2}{*}{Method}"], [""], []
    start = 2
    for group, own in groupby(columns, key=lambda column: column.group):
        members = list(own)
        if group:
            above.append(f"\\multicolumn{{{len(members)}}}{{c}}{{{escape(group)}}}")
            below += [escape(column.head) for column in members]
            rules.append(f"\\cmidrule(lr){{{start}-{start + len(members) - 1}}}")
        else:
            above += [f"\\multirow{{2}}{{*}}{{{escape(column.head)}}}" for column in members]
            below += [""] * len(members)
        start += len(members)
    return [" & ".join(above) + r" \\", "".join(rules), " & ".join(below) + r" \\"]


def _latex_cell(line: Line, column: Column) -> str:
    cell: Cell = line.cells[column.key]
    text = escape(column.shown(cell))
    if column.key in line.best:
        return f"\\textbf{{{text}}}"
    return f"\\underline{{{text}}}" if column.key in line.second else text
