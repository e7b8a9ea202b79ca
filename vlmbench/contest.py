"""A stage's race: the fastest dense side against the method's own, both recorded and replayed where that can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Protocol

from vlmbench.bench_row import add_note, close_row
from vlmbench.errors import RunError
from vlmbench.graphs import NotRecordedError
from vlmbench.rounds import Clock, Side, fastest, out_of_memory, race


class Replayable(Protocol):
    """`recorded.Decoding` or `recorded.Tower`."""

    def restart(self) -> None: ...

    def run(self) -> None: ...


Make = Callable[[Any], Replayable]
"""Records what a side's `ready` gave; raises `NotRecordedError`."""


def contest(
    row: dict[str, Any],
    dense: Mapping[str, Side],
    own: Side,
    rounds: int,
    clock: Clock,
    make: Make | None,
    *,
    own_kernel: bool,
    brief: Make | None = None,
    in_order: bool = False,
) -> tuple[Side | None, Side]:
    """Put the rounds into the row. Returns both sides as they run unrecorded; nothing recorded is left.

    Where `make` cannot record a side it runs as it is, and the row is marked ``eager``; where it cannot record the dense one,
    both do. A method without a kernel of its own
    (`own_kernel`) runs under the best dense one. `brief` records less of the same, for finding the fastest dense side; with
    `in_order` the first that runs is taken for it. Raises `RunError` when there are dense sides and none runs here.
    """
    shorter = brief or make
    best, seconds, refused = fastest(
        {name: recorded(each, shorter) for name, each in dense.items()}, clock, in_order=in_order
    )
    why = None
    if make and dense and best is None and not _no_memory(refused):
        why = next(iter(refused.values()))
        best, seconds, refused = fastest(dense, clock)
    elif best is not None and brief is not None:
        best = recorded(dense[best.name], make)
        try:
            best.ready(None)  # now, while the method is not there
        except NotRecordedError as error:
            best, why = dense[best.name], str(error)
    if why:  # a recorded method would have it too easy, and would stay attached while dense runs as it is
        mark_eager(row, f"dense attention was not recorded: {why}")
        make = None
    if dense and best is None and not _no_memory(refused):
        raise RunError(f"No dense attention kernel runs here ({'; '.join(refused.values())}).")
    plain = dense[best.name] if best else None
    if plain is not None and not own_kernel:
        own = replace(own, around=partial(_both, plain.around, own.around))
    with ExitStack() as stack:
        run = race(best, _recorded_or_plain(row, own, make, stack), rounds, clock)
    close_row(row, run, seconds, refused)
    return plain, own


def recorded(side: Side, make: Make | None) -> Side:
    """`side` recorded when it is first made ready, outside the time; itself without `make`."""
    if make is None:
        return side

    @lru_cache
    def made() -> Replayable:
        with side.around() as entered:
            return make(side.ready(entered))

    return Side(side.name, lambda _: made().run(), lambda _: made().restart())


def mark_eager(row: dict[str, Any], why: str | None = None) -> None:
    """A side's operations were launched one by one by the library's own Python."""
    row["marks"] = [*row["marks"], *(["eager"] if "eager" not in row["marks"] else [])]
    if why:
        add_note(row, why)


def _recorded_or_plain(row: dict[str, Any], side: Side, make: Make | None, stack: ExitStack) -> Side:
    """The method stays attached until `stack` closes: what its closures hold is read by replays."""
    if make is None:
        return side
    entered = stack.enter_context(side.around())
    found = recorded(replace(side, around=lambda: nullcontext(entered)), make)
    try:
        found.ready(None)
    except NotRecordedError as error:
        stack.close()
        mark_eager(row, f"{row['method']} was not recorded: {error}")
        return side
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    return found  # if memory ran out, the race will say so


def _no_memory(refused: Mapping[str, str]) -> bool:
    return any("memory" in reason for reason in refused.values())


@contextmanager
def _both(first: Any, second: Any) -> Iterator[Any]:
    with ExitStack() as stack:
        stack.enter_context(first())
        yield stack.enter_context(second())
