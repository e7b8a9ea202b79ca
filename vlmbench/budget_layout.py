"""The layout `latency-budget`: what ``run --latency-limit`` wrote, one band a limit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmbench import comparable
from vlmbench.comparable import Facts, Item
from vlmbench.errors import UsageError
from vlmbench.laid_out import Band, Cell, Column, Line, Table
from vlmbench.loaded import BASELINE, Loaded, texts
from vlmbench.record import SCHEMA
from vlmbench.spec import Spec
from vlmbench.store import RunView

COLUMNS = (
    Column("frames", "frames", form=".0f"),
    Column("seconds", "s"),
    Column("accuracy", "accuracy, %", scale=100.0, form=".1f", kind="accuracy"),
    Column("n", "n", form=".0f"),
)


def tables(folder: Path, split: str | None = None) -> list[Table]:
    """One table, or one for each value of a field. Raises `UsageError`."""
    paths = sorted(folder.rglob("latency-limit-*.json"))
    if not paths:
        raise UsageError(f"{folder} holds no latency-limit-*.json; `vlmbench run --latency-limit SECONDS` writes one.")
    known = []
    for path in paths:
        try:
            data = json.loads(path.read_bytes())
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}")
            band = Band(f"At most {data['limit_s']:g} s", [_line(path, row) for row in data["rows"]])
            known.append((_facts(data), (path, data, band)))
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UsageError(f"{path} is not what `run --latency-limit` writes ({error}); run it again.") from error
    parts = comparable.split(known, split) if split else {"": [each for _, each in known]}
    facts = {path: each for each, (path, _, _) in known}
    found = []
    for value, part in parts.items():
        comparable.check([Item(path.name, facts[path], path) for path, _, _ in part])
        part = sorted(part, key=lambda each: each[1]["limit_s"])
        first = part[0][1]
        table = Table(
            "latency-budget",
            f"{first['model']} on {first['suite']}, the most frames in time",
            list(COLUMNS),
            [band for _, _, band in part],
            _notes([data for _, data, _ in part]),
            f"{split}={value}" if split else "",
        )
        found.append(table)
    return found


def _line(path: Path, row: Mapping[str, Any]) -> Line:
    params = str(Spec("", texts(row["params"]))).lstrip(":")
    stored = path.parent / row["run"] if row["run"] else None
    # The paired answers, when the runs still lie beside the file; without them nothing is claimed to be best.
    runs = {"": Loaded(RunView(stored))} if stored and (stored / "header.json").exists() else {}
    failed = [step["failed"] for step in row["ladder"]]
    oom = row["frames"] is None and any(each.startswith("oom") for each in failed)
    cells = {
        "frames": Cell(row["frames"], oom=oom),
        "seconds": Cell(row["seconds"]),
        "accuracy": Cell(row["accuracy"], row["accuracy_low"], row["accuracy_high"]),
        "n": Cell(row["n"] if row["frames"] is not None else None),
    }
    return Line(row["method"], params, runs, cells, (), row["method"] == BASELINE, row["method"] != BASELINE)


def _facts(data: Mapping[str, Any]) -> Facts:
    device = data["device"]
    found = {
        "model": data["model"],
        "weights_hash": data["weights_hash"],
        "suite": data["suite"],
        "suite_version": data["suite_version"],
        "sampler": data["sampler"],
        "max_new_tokens": data["max_new_tokens"],
        "dtype": device["dtype"],
        "card": device["cpu" if device["type"] == "cpu" else "name"],
        "threads": data["threads"],
        "torch": data["versions"].get("torch"),
        "transformers": data["versions"].get("transformers"),
        "kernel": data["kernels"]["attention"],
        "vision_kernel": data["kernels"]["vision"],
    }
    return {name: "none" if value is None else str(value) for name, value in found.items()}


def _notes(files: list[Mapping[str, Any]]) -> list[str]:
    first = files[0]
    device, versions = first["device"], first["versions"]
    said = [
        "frames: the most whose median time meets the limit, from the video file to the last of "
        f"{first['max_new_tokens']} tokens, of the steps {', '.join(map(str, first['steps']))}",
        "— : meets the limit at no frame count",
        "accuracy: every question, unfinished ones wrong",
        "bold: best of a band, underlined: second best, each only where the difference to the next exceeds its 95 % error; "
        "full attention is not ranked",
        f"{device['name']} ({device['type']}, {device['cpu']}, {first['threads']} threads); {device['dtype']}; attention "
        f"{first['kernels']['attention']}, in the vision tower {first['kernels']['vision']}; frames by {first['sampler']}; "
        f"batch 1; {first['repeats']} rounds after {first['warmup']} of warm-up",
    ]
    for data in files:
        commit = f" at {data['commit'][:10]}{' with changes' if data['dirty'] else ''}" if data["commit"] else ""
        torch = f", torch {versions['torch']}" if "torch" in versions else ""
        said.append(f"vlmbench {versions.get('vlmbench', '')}{commit}{torch}")
    return list(dict.fromkeys(said))
