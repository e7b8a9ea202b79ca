"""What a method did on one sample. The engine makes it; methods fill it; work, kept counts and pictures come from it."""

from __future__ import annotations

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
    applied: bool = True
    reason: str = ""
    sample_id: str = ""
    """Set by the engine; what is random in a method is drawn from it, so that every run draws the same."""

    def inactive(self, reason: str) -> None:
        """The method had nothing to do on this sample, and why."""
        self.applied, self.reason = False, reason

    def reset(self, sample_id: str) -> None:
        """Forget the earlier sample."""
        self.sample_id = sample_id
        self.kept.clear()
        self.facts.clear()
        self.scratch.clear()
        self.applied, self.reason = True, ""

    def to_json(self) -> dict[str, Any]:
        """Index lists become ``[start, length]`` runs: short for the usual case of whole spans."""
        return {"kept": {name: runs(indices) for name, indices in self.kept.items()}, **self.facts}


def runs(indices: list[int]) -> list[list[int]]:
    """Sorted indices as ``[start, length]`` runs."""
    found = []
    for _, group in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        found.append([run[0], len(run)])
    return found
