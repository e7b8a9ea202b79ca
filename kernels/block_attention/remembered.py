"""What is made from a plan once and used in every layer, and a way to forget it.

An equal plan finds what an earlier prompt's made. Whoever times a prompt forgets it before, so that the making is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
_CLEAR: list[Callable[[], None]] = []


def remembered(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`lru_cache` for what is made from a plan."""

    def wrap(make: Callable[P, R]) -> Callable[P, R]:
        made = lru_cache(maxsize)(make)
        _CLEAR.append(made.cache_clear)
        return cast(Callable[P, R], made)

    return wrap


def forget() -> None:
    """The next call of every kernel makes its tables again, as in the first layer of a new prompt."""
    for clear in _CLEAR:
        clear()
