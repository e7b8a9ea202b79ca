"""Which runs may stand in one table: a field in which they differ is named and refused, unless the table is made of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from vlmbench.errors import UsageError
from vlmbench.loaded import Loaded
from vlmbench.spec import nearest
from vlmbench.tables import wrote

T = TypeVar("T")

FIELDS = (
    *("model", "revision", "weights_hash", "suite", "suite_name", "suite_version", "suite_hash"),
    *("frames", "fps", "sampler"),
    *("max_pixels", "min_pixels", "decoder", "prompt_style", "max_new_tokens", "attention", "dtype", "device_type"),
    *("card", "driver", "threads", "torch", "transformers", "kernel", "vision_kernel", "seed"),
)
"""What two methods must share to be compared; the first in which they differ is what one would split by."""
OF_SUITE = (
    "suite",
    "suite_name",
    "suite_version",
    "suite_hash",
    "frames",
    "fps",
    "sampler",
    "decoder",
    "prompt_style",
    "max_new_tokens",
)
OF_MODEL = ("model", "revision", "weights_hash", "max_pixels", "min_pixels", "attention", "kernel", "vision_kernel")
OF_LENGTH = ("suite", "suite_version", "suite_hash", "frames")

Facts = Mapping[str, str]


def facts(run: Loaded) -> Facts:
    """Field -> value of a run, as text; where its sessions differ, all of them."""
    spec, sessions = run.spec, wrote(run.view)
    found = {name: spec[name] for name in FIELDS if name in spec}
    found |= {"suite": run.suite, "suite_name": spec["suite"], "frames": run.spec["frames"]}
    found |= {"suite_hash": run.header.get("suite_hash")}
    measured = {
        "card": [each["device"]["cpu" if each["device"]["type"] == "cpu" else "name"] for each in sessions],
        "driver": [each["driver"] for each in sessions],
        "threads": [each["measure"]["threads"] for each in sessions],
        "torch": [each["versions"].get("torch") for each in sessions],
        "transformers": [each["versions"].get("transformers") for each in sessions],
        "kernel": [each["kernels"]["attention"] for each in sessions],
        "vision_kernel": [each["kernels"]["vision"] for each in sessions],
    }
    joined = {name: " and ".join(sorted({_text(value) for value in values})) for name, values in measured.items()}
    return {name: _text(value) for name, value in found.items()} | joined


def _text(value: object) -> str:
    return "none" if value is None else str(value)


class Item(NamedTuple):
    """One run of a comparison."""

    name: str
    """Of its method."""
    facts: Facts
    place: Hashable
    """The part of the table that it belongs to: fields named in `free` need to agree only there."""


def check(items: Sequence[Item], free: Iterable[str] = (), split: bool = True) -> None:
    """Raises `UsageError` naming the fields in which the runs differ; the remedy names --split where there is one."""
    differ: dict[str, dict[str, list[str]]] = {}
    allowed = set(free)
    for field in FIELDS:
        places: dict[Hashable, dict[str, list[str]]] = {}
        for item in items:
            if field in item.facts:
                values = places.setdefault(item.place if field in allowed else None, {})
                values.setdefault(item.facts[field], []).append(item.name)
        if several := next((values for values in places.values() if len(values) > 1), None):
            differ[field] = several
    if differ:
        field, values = next(iter(differ.items()))
        shown = "; ".join(f"{value}: {', '.join(dict.fromkeys(names))}" for value, names in values.items())
        others = f", and in {', '.join(list(differ)[1:])}" if len(differ) > 1 else ""
        remedy = f", or give --split {field}" if split else ""
        raise UsageError(f"The runs differ in {field} ({shown}){others}; name a folder that holds one kind{remedy}.")


def split(items: Sequence[tuple[Facts, T]], field: str) -> dict[str, list[T]]:
    """Value -> what has it, in the order of first appearance. Raises `UsageError` for a field that is none."""
    if field not in FIELDS:
        raise UsageError(f"--split must be one of {', '.join(FIELDS)}, not {field!r}.{nearest(field, FIELDS)}")
    found: dict[str, list[T]] = {}
    for each, item in items:
        found.setdefault(each.get(field, "none"), []).append(item)
    return found
