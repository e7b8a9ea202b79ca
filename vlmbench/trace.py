"""What a method did on one sample. The engine makes it; methods fill it; work, kept counts and pictures come from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


@dataclass
class Trace:
    """Reset by the engine before each sample, so that it never tells of an earlier one."""

    kept: dict[str, list[int]] = field(default_factory=dict)
    """Stage or layer name -> indices kept there, in the numbering before that stage."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Densities, recalls, plans: small and ready for JSON."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """What one stage of a method hands to a later one (tensors too), under the method's name; never written anywhere."""
    sample_id: str = ""
    """Set by the engine; what is random in a method is drawn from it, so that every run draws the same."""
    parts: dict[str, Trace] = field(default_factory=dict)
    """Of methods joined with ``+``: each one's, see `part`."""
    _later: dict[str, Callable[[], None]] = field(default_factory=dict)
    """What fills in the rest when somebody reads, see `later`."""
    _idle: str | None = None
    """Why there was nothing to do."""

    @property
    def applied(self) -> bool:
        """Whether the method, or any of several joined ones, had something to do on this sample."""
        self.settle()
        return any(each.applied for each in self.parts.values()) if self.parts else self._idle is None

    @applied.setter
    def applied(self, applied: bool) -> None:
        self._idle = None if applied else self._idle or ""

    @property
    def reason(self) -> str:
        """Why it had not."""
        self.settle()
        if self.parts:
            return "" if self.applied else "; ".join(f"{name}: {why}" for name, why in self.idle.items())
        return self._idle or ""

    @reason.setter
    def reason(self, reason: str) -> None:
        if self._idle is not None:
            self._idle = reason

    @property
    def idle(self) -> dict[str, str]:
        """Of joined methods those that had nothing to do, and why."""
        return {name: each.reason for name, each in self.parts.items() if not each.applied}

    def part(self, name: str) -> Trace:
        """What one of several joined methods sees: all of this but whether the others had something to do."""
        if name not in self.parts:
            self.parts[name] = Trace(self.kept, self.facts, self.scratch, self.sample_id)
        return self.parts[name]

    def later(self, name: str, tell: Callable[[], None]) -> None:
        """Put off what would wait for the device in the middle of a prefill. `tell` is called once, before anything is read
        but `facts` and `scratch` themselves; a second one of the same `name` takes the place of the first."""
        self._later[name] = tell

    def settle(self) -> None:
        """Have everything told that was put off: what reads `facts` or `scratch` itself calls it first."""
        waiting = [*self._later.values()]
        self._later.clear()
        for tell in waiting:
            tell()
        for each in self.parts.values():
            each.settle()

    def inactive(self, reason: str) -> None:
        """The method had nothing to do on this sample, and why."""
        self._idle = reason

    def reset(self, sample_id: str) -> None:
        """Forget the earlier sample."""
        self.sample_id = sample_id
        self.kept.clear()
        self.facts.clear()
        self.scratch.clear()
        self._later.clear()
        self._idle = None
        for each in self.parts.values():
            each.sample_id, each._idle = sample_id, None
            each._later.clear()

    def to_json(self) -> dict[str, Any]:
        """Index lists become ``[start, length]`` runs: short for the usual case of whole spans."""
        self.settle()
        found = {"kept": {name: runs(indices) for name, indices in self.kept.items()}, **self.facts}
        return found | ({"idle": self.idle} if self.idle else {})


def runs(indices: list[int]) -> list[list[int]]:
    """Sorted indices as ``[start, length]`` runs."""
    found = []
    for _, group in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        found.append([run[0], len(run)])
    return found
