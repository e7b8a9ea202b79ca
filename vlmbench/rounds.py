"""Two sides timed in turns: interleaved rounds whose order turns, warm-up outside, a side that runs out of memory named."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vlmbench.live import LiveStorages

WARMUP = 1
REFUSALS = (RuntimeError, ValueError, ImportError, TypeError, AttributeError)
"""Not for this device, dtype or size; no compiler for it; or this torch calls it otherwise."""
FAR = 1.5
"""Times the best so far: what no second look would make the fastest."""


@dataclass(frozen=True)
class Side:
    """One contender. `around` is entered and `ready` called before the clock starts; only `call` is timed."""

    name: str
    call: Callable[[Any], Any]
    """Takes what `ready` gave."""
    ready: Callable[[Any], Any] = lambda entered: entered
    """Takes what entering `around` gave."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def seconds(self, clock: Clock) -> float:
        with self.around() as entered:
            given = self.ready(entered)
            return clock(lambda: self.call(given))


class Clock:
    """Seconds of one call, the device idle before and after."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], Any]) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


@dataclass
class Race:
    """What was measured; a side that ran out of memory has no rounds and says so in `failed`."""

    dense: Side | None = None
    """The dense side that ran."""
    dense_s: list[float] = field(default_factory=list)
    method_s: list[float] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """"dense" or "method" -> what the allocator said."""
    refused: dict[str, str] = field(default_factory=dict)
    """Dense sides that another one stands in for, and what they said."""

    @property
    def ratios(self) -> list[float]:
        """Dense over method, round by round; empty when either side is missing."""
        if self.failed:
            return []
        return [dense / own for dense, own in zip(self.dense_s, self.method_s, strict=True)]


def race(dense: Side | None, own: Side, rounds: int, clock: Clock, instead: Sequence[Side] = ()) -> Race:
    """`WARMUP` rounds that do not count and `rounds` that do; a side that runs out of memory leaves the race.

    The first of `instead` takes the place of a dense side that refuses in the warm-up: a kernel that was the fastest on a
    shorter prompt may not take a long one.
    """
    found, left = Race(dense=dense), list(instead)
    into = {"dense": found.dense_s, "method": found.method_s}
    sides = {"method": own} | ({"dense": dense} if dense else {})
    for turn in range(WARMUP + rounds):
        for key in sorted(sides, reverse=bool(turn % 2)):
            while key not in found.failed:
                try:
                    into[key].append(sides[key].seconds(clock))
                    break
                except RuntimeError as error:
                    if out_of_memory(error):
                        found.failed[key] = first_line(error)
                        into[key].clear()
                    elif key == "dense" and left and turn < WARMUP:
                        found.refused[sides[key].name] = first_line(error)
                        found.dense = sides[key] = left.pop(0)
                    else:
                        raise
                    release()
    for seconds in into.values():
        del seconds[:WARMUP]
    return found


def turns(sides: Mapping[str, Side], rounds: int, clock: Clock) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every side that runs here, `rounds` of each after `WARMUP`, in turns; and why the others did not run."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    refused: dict[str, str] = {}
    for turn in range(WARMUP + rounds):
        names = [*seconds]
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else ():
            try:
                seconds[name].append(sides[name].seconds(clock))
            except REFUSALS as error:
                refused[name] = first_line(error)
                del seconds[name]
                release()
    return {name: each[WARMUP:] for name, each in seconds.items()}, refused


def fastest(
    sides: Mapping[str, Side], clock: Clock, *, in_order: bool = False
) -> tuple[Side | None, dict[str, float], dict[str, str]]:
    """The fastest side that runs here, the seconds of each after a warm-up, and why the others did not run.

    A side that is far behind is timed once: at a million tokens that is a minute. With `in_order` the first that runs is
    taken, and its one call is the only one.
    """
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, side in sides.items():
        try:
            once = side.seconds(clock)
            if in_order:
                seconds[name] = once
                break
            seconds[name] = once = side.seconds(clock)
            if once < FAR * min(seconds.values()):
                seconds[name] = median((once, side.seconds(clock)))
        except REFUSALS as error:
            refused[name] = first_line(error)
            release()
    best = min(seconds, key=lambda name: seconds[name]) if seconds else None
    return (sides[best] if best else None), seconds, refused


def peak_bytes(side: Side, known: list[Tensor], device: torch.device, besides: int = 0) -> int:
    """Most bytes held while `side` runs, `known` tensors (weights, inputs) included, without `besides` that are another's."""
    with side.around() as entered:
        if device.type == "cuda":
            given = side.ready(entered)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            side.call(given)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - besides
        with LiveStorages(known) as live:
            given = side.ready(entered)  # what it makes and keeps (a cache, copied weights) is held while the call runs
            live.restart_peak()
            side.call(given)
        return live.peak


def out_of_memory(error: BaseException) -> bool:
    """The CPU allocator has no exception class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release() -> None:
    """Hand back what nothing needs any more: models in cycles of references first, then the allocator's unused blocks."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
