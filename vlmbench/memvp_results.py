"""``memvp.json``: what `memvp_rival` and `memvp_ablations` measured, part by part, and the text that is made of it.

A row is of one part, one model and one suite. Measuring a part of a model on a suite again replaces its rows and no others,
so both commands may be stopped, and called one model at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmbench import header
from vlmbench.errors import RunError, UsageError
from vlmbench.files import read_json, write_json
from vlmbench.memvp_text import PARTS, to_markdown
from vlmbench.tables import versions_text

Row = dict[str, Any]
NAME = "memvp.json"


def stored(out: Path) -> dict[str, list[Row]]:
    """What earlier calls measured. Raises `UsageError`."""
    path = out / NAME
    data = read_json(path, {"schema": 1, "rows": [], "measured_on": []})
    if not isinstance(data, dict) or data.get("schema") != 1:
        raise UsageError(f"{path} is no result of schema 1; delete it, or name another --out.")
    return data


def rows_of(out: Path, part: str, model: str, suite: str) -> list[Row]:
    return [row for row in stored(out)["rows"] if _is_of(row, part, model, suite)]


def put(out: Path, part: str, model: str, suite: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace these rows, and write the file and its text. Raises `RunError`."""
    data, here = stored(out), {"part": part, "model": model, "suite": suite}
    said = {"versions": header.versions(), **header.source()}
    machine = f"{header.cpu_name()}, {header.cores()} cores, {torch.get_num_threads()} threads; {versions_text(said)}"
    made = {"rows": [{**here, **row} for row in rows], "measured_on": [{**here, "on": machine}]}
    for key, own in made.items():
        others = [row for row in data[key] if not _is_of(row, part, model, suite)]
        data[key] = sorted(
            [*others, *own], key=lambda row: (list(PARTS).index(row["part"]), row["model"], row["suite"])
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / NAME, {"schema": 1, **{key: data[key] for key in made}})
        (out / "memvp.md").write_text(to_markdown(data), "utf-8")
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error


def _is_of(row: Mapping[str, Any], *where: str) -> bool:
    return (row["part"], row["model"], row["suite"]) == where
