"""What several commands of the command line share: choices of an option, and how rows are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from vlmbench.errors import UsageError

DEMO_METHODS = ("pevlm", "turbo:mode=drop", "uniform:ratio=0.25", "blind", "prior")
DEMO_SUITE = "synthvideo:length=384"
DEMO_LIMIT = 11
DEMO_TIMED = 2


class Listing(StrEnum):
    text = "text"
    json = "json"


def print_rows(rows: list[dict[str, Any]], said: Mapping[str, Any] | None = None) -> None:
    """As every machine-readable output; `said` stands before the rows."""
    print(json.dumps({"schema": 1, **(said or {}), "rows": rows}, indent=1))


def only_one(methods: list[str]) -> str:
    """The method of a command that takes one. Raises `UsageError` when --method was repeated."""
    if len(methods) != 1:
        raise UsageError(
            f"This command takes one --method, not {len(methods)} ({', '.join(methods)}); run it once for each."
        )
    return methods[0]
