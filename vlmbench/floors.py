"""The baseline file of `vlmbench gate`: floors for each piece of work on each machine, as data that a person may edit.

``{"schema": 1, "rows": [{card, driver, torch, model, suite, method, params, shape, floors: {metric: floor}, updated}]}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmbench.errors import RunError, UsageError
from vlmbench.files import write_json
from vlmbench.header import now
from vlmbench.record import SCHEMA
from vlmbench.spec import joined
from vlmbench.tables import SPANS

METRICS = (*(f"speedup_{span}" for span in SPANS), "accuracy_delta")


class Machine(NamedTuple):
    """What a speed-up depends on beside the work."""

    card: str
    """On a CPU its name, the cores that the process had and the threads that it used."""
    driver: str | None
    torch: str | None

    @classmethod
    def of(cls, session: Mapping[str, Any]) -> Machine:
        device = session["device"]
        cpu = f"{device['cpu']}, {device['cores']} cores, {session['measure']['threads']} threads"
        card = cpu if device["type"] == "cpu" else device["name"]
        return cls(str(card), session["driver"], session["versions"].get("torch"))

    def __str__(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        return f"{self.card}{driver}, torch {self.torch or 'unknown'}"


class Key(NamedTuple):
    """One piece of work."""

    model: str
    suite: str
    method: str
    params: str
    """``key=value,…``, defaults included."""
    shape: str
    """Frames, pixels, answer length, dtype and attention, in the same notation."""

    @property
    def method_spec(self) -> str:
        return joined(self.method, self.params)

    @property
    def text(self) -> str:
        return f"{self.method_spec} ({self.model}, {self.suite}, {self.shape})"


class Row(NamedTuple):
    machine: Machine
    key: Key
    floors: Mapping[str, float]
    updated: str


class Baseline:
    """All rows of one file."""

    def __init__(self, path: Path, rows: Sequence[Row] = ()) -> None:
        self.path, self.rows = path, tuple(rows)

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Raises `UsageError` when it is missing, malformed or of another schema."""
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UsageError(f"{path} is not there; --update-baseline writes it.") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read ({error}); --update-baseline on a new name writes one.") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("rows"), list):
            raise UsageError(f"{path} is no baseline of schema {SCHEMA}; --update-baseline on a new name writes one.")
        return cls(path, [_row(path, number, row) for number, row in enumerate(data["rows"])])

    def of(self, machine: Machine, ratios_only: bool) -> tuple[list[Row], str]:
        """The rows for a machine, and a note when they are of another one, which only `ratios_only` allows."""
        own = [row for row in self.rows if row.machine == machine]
        if own:
            return own, ""
        if not self.rows:
            raise UsageError(f"{self.path} holds no floors; --update-baseline writes them.")
        newest = max(self.rows, key=lambda row: row.updated).machine
        if not ratios_only:
            differs = ", ".join(
                f"{name} {there or 'none'} against {here or 'none'} here"
                for name, here, there in zip(Machine._fields, machine, newest, strict=True)
                if here != there
            )
            raise UsageError(
                f"{self.path} is of another machine ({differs}); --ratios-only compares all the same, --update-baseline "
                "adds this one."
            )
        return [row for row in self.rows if row.machine == newest], f"floors are of another machine: {newest}"

    def update(self, machine: Machine, floors: Mapping[Key, Mapping[str, float]]) -> None:
        """Replace the machine's rows of these keys and the file, atomically. Raises `RunError`."""
        kept = [row for row in self.rows if row.machine != machine or row.key not in floors]
        self.rows = (*kept, *(Row(machine, key, each, now()) for key, each in floors.items()))
        rows = [
            {**row.machine._asdict(), **row.key._asdict(), "floors": dict(row.floors), "updated": row.updated}
            for row in self.rows
        ]
        try:
            write_json(self.path, {"schema": SCHEMA, "rows": rows})
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}); name another file.") from error


def _row(path: Path, number: int, data: Any) -> Row:
    try:
        floors = dict(data["floors"])
        row = Row(
            Machine(*(data[name] for name in Machine._fields)),
            Key(*(str(data[name]) for name in Key._fields)),
            floors,
            str(data["updated"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: row {number} lacks {error}; --update-baseline on a new name writes one.") from error
    for metric, floor in floors.items():
        number_ = isinstance(floor, (int, float)) and not isinstance(floor, bool) and math.isfinite(floor)
        if metric not in METRICS or not number_:
            raise UsageError(
                f"{path}: row {number} has the floor {metric!r}: {floor!r}; it must be a number for one of "
                f"{', '.join(METRICS)}."
            )
    return row
