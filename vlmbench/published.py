"""Numbers that papers report, beside ours and never among them: rows of a YAML file, each with its source and its standing.

They are of other models, cards and frames; what stands beside them here is the nearest figure of the same method, so that a
reader sees both and neither is averaged, ranked or compared with the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmbench.errors import UsageError
from vlmbench.plain import cell, code, note
from vlmbench.spec import joined
from vlmbench.tables import COLUMNS

SCHEMA = 1
STANDINGS = {
    "paper": "read in the paper",
    "code": "read in the authors' repository",
    "second-hand": "second-hand",
    "doubtful": "second-hand, sources disagree or do not say enough",
}
NUMBER = (int, float)
NEEDED: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "model", "task", "metric", "unit", "source", "standing"), (str,)),
    "value": NUMBER,
}
OPTIONAL: Mapping[str, tuple[type, ...]] = {"full": NUMBER, "column": (str,), "note": (str,)}

Row = Mapping[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """Every row, its source written out. Raises `UsageError` when the file is missing, malformed or of another schema."""
    import yaml  # type: ignore[import-untyped]

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} cannot be read ({' '.join(str(error).split())}); name another --published."
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("rows"), list):
        raise UsageError(f"{path} is no file of published numbers of schema {SCHEMA}; see results/published.yaml.")
    sources = data.get("sources") or {}
    for number, row in enumerate(data["rows"]):
        if fault := _fault(row, sources):
            raise UsageError(f"{path}: row {number} {fault}; see results/published.yaml.")
    return [{**row, "source": sources[row["source"]]} for row in data["rows"]]


def _fault(row: Any, sources: Any) -> str:
    if not isinstance(row, dict):
        return "is no mapping"
    for name, kind in {**NEEDED, **{name: kind for name, kind in OPTIONAL.items() if name in row}}.items():
        if name not in row:
            return f"lacks {name}"
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            return f"has {name}: {row[name]!r}"
    if unknown := sorted(set(row) - set(NEEDED) - set(OPTIONAL)):
        return f"has the unknown {unknown[0]}"
    if row["standing"] not in STANDINGS:
        return f"has the standing {row['standing']!r}, not one of {', '.join(STANDINGS)}"
    if row["source"] not in sources:
        return f"has the source {row['source']!r}, which sources do not name"
    return (
        f"has the column {row['column']!r}, which no table has" if row.get("column", COLUMNS[0]) not in COLUMNS else ""
    )


def beside(published: Sequence[Row], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The published rows of methods in `rows`, each with ``here``: the same column of our rows of that method."""
    found = []
    for each in published:
        own = [row for row in rows if row["method"] == each["method"]]
        if own:
            column = str(each.get("column") or "")
            known = [row for row in own if column and row[column] is not None]
            here = [
                {"model": row["model"], "suite": row["suite"], "params": row["params"], "value": row[column]}
                for row in known
            ]
            found.append({**dict.fromkeys(OPTIONAL), **each, "here": here})
    return found


def to_markdown(found: Sequence[Row]) -> str:
    """A table of its own, below ours."""
    if not found:
        return "No number of these methods is published in the file.\n"
    lines = [
        "**Published, not measured here**",
        "",
        "| method | | on | what | value | full attention there | standing |",
    ]
    lines.append("| --- | --- | --- | --- | ---: | ---: | --- |")
    for row in found:
        full = "—" if row["full"] is None else f"{row['full']:g} {row['unit']}"
        cells = ("published", f"{row['model']}; {row['task']}", row["metric"], f"{row['value']:g} {row['unit']}", full)
        lines.append(f"| {code(row['method'])} | {' | '.join(map(cell, cells))} | {STANDINGS[row['standing']]} |")
        for own in row["here"]:
            value = own["value"] * (100 if row["unit"] == "%" else 1)
            ours = (
                "here",
                f"{own['model']}; {own['suite']}",
                row["column"],
                f"{value:.3g} {row['unit']}",
                "",
                "measured here",
            )
            name = joined(row["method"], own["params"] or "")
            lines.append(f"| {code(name)} | {' | '.join(map(cell, ours))} |")
    used = dict.fromkeys((row["method"], row["source"]) for row in found)
    lines += ["", *(f"- {note(f'{method}: {source}')}" for method, source in used)]
    lines += dict.fromkeys(
        f"- {note(row['metric'])} on {note(row['task'])}: {note(row['note'])}" for row in found if row["note"]
    )
    lines.append(
        "- other models, cards and frames: the two kinds of rows are not comparable, and nothing here is computed from both"
    )
    return "\n".join(lines) + "\n"
