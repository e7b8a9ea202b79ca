"""One stored run as a report reads it: its records by pass and sample, and what they are worth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from statistics import median
from typing import Any

from vlmbench.budget import Spent, spent
from vlmbench.record import FINISHED, SampleRecord
from vlmbench.rescore import suite_version
from vlmbench.spec import Spec
from vlmbench.store import Run, RunView

BASELINE = "full"
INACTIVE_LIMIT = 0.1
"""With a larger share of samples on which the method had nothing to do, its speed-up would not be its own."""


class Loaded:
    """The records of one run by pass and sample."""

    def __init__(self, view: RunView | Run) -> None:
        self.view = view
        self.header = view.header
        self.spec: Mapping[str, Any] = view.header["spec"]
        self.method = str(self.spec["method"])
        self.accuracy = view.records.of("accuracy")
        self.latency = {id_: each for id_, each in view.records.of("latency").items() if each.timing}
        self.memory = [each.memory for each in view.records.of("memory").values() if each.memory]

    @cached_property
    def samples(self) -> Mapping[str, SampleRecord]:
        """What `n` counts: the accuracy pass, or any other when there is none."""
        return self.accuracy or self.view.records.of("latency") or self.view.records.of("memory")

    @property
    def suite(self) -> str:
        return str(Spec(self.spec["suite"], texts(self.spec["suite_params"])))

    @property
    def params(self) -> str:
        """``key=value,…`` of the method, defaults included."""
        return typed(self.spec["method_params"])

    @cached_property
    def group(self) -> str:
        """Runs with the same key differ in nothing but the method: they were asked the same questions on the same files."""
        rest = {key: value for key, value in self.spec.items() if key not in ("method", "method_params")}
        data = {"suite_version": suite_version(self.header), "suite_hash": self.header.get("suite_hash")}
        return json.dumps({**rest, **data}, sort_keys=True, default=str)

    @property
    def order(self) -> tuple[Any, ...]:
        named = (str(self.spec["model"]), self.suite, self.frames or 0, self.group)
        return (*named, self.method != BASELINE, self.method, self.params)

    @property
    def frames(self) -> int | None:
        """Frames asked for, else the median of what was decoded."""
        if self.spec["frames"] is not None:
            return int(self.spec["frames"])
        decoded = median_of(len(each.frames) for each in self.samples.values() if each.frames)
        return None if decoded is None else round(decoded)

    @cached_property
    def mixed(self) -> bool:
        """Whether videos of several lengths were asked about."""
        return len({len(each.frames) for each in self.samples.values() if each.frames}) > 1

    @cached_property
    def n_visual_tokens(self) -> float | None:
        return median_of(each.tokens["visual"] for each in self.samples.values() if "visual" in each.tokens)

    @cached_property
    def spent(self) -> Spent | None:
        """What the average sample of the accuracy pass cost; None of runs from before that was counted."""
        return spent(self.accuracy.values())

    @cached_property
    def scores(self) -> dict[str, float]:
        """Unfinished and unreadable answers are wrong; questions without reference answers have no scores."""
        if not self.header.get("scored", True):
            return {}
        return {id_: each.score if each.status == "ok" else 0.0 for id_, each in self.accuracy.items()}

    @cached_property
    def finished(self) -> set[str]:
        return {id_ for id_, each in self.accuracy.items() if each.status in FINISHED}

    @cached_property
    def n_inactive(self) -> int:
        """Samples on which the method, or one of those joined in it, had nothing to do."""
        return sum(not each.applied or _idle(each) for each in self.samples.values() if each.status in FINISHED)

    @property
    def mostly_active(self) -> bool:
        return self.n_inactive <= INACTIVE_LIMIT * len(self.samples)


def _idle(record: SampleRecord) -> bool:
    return bool((record.trace or {}).get("idle"))


def median_of(values: Iterable[float]) -> float | None:
    known = list(values)
    return median(known) if known else None


def typed(params: Mapping[str, Any]) -> str:
    """``key=value,…`` of parameters."""
    return str(Spec("", texts(params))).lstrip(":")


def texts(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as one would type them; those that are None are left out."""
    return {key: _text(value) for key, value in params.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "/".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
