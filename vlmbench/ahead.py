"""Doing the next items' slow first step while the present one is worked on: a bounded queue with one thread behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Ready = TypeVar("Ready")


class Ahead(Generic[Item, Ready]):
    """``ready(item)`` for every item in order, at most `depth` of them ahead of the one last taken."""

    def __init__(self, ready: Callable[[Item], Ready], items: Iterable[Item], depth: int = 2) -> None:
        self._ready = ready
        self._items: Iterator[Item] = iter(items)
        self._depth = depth
        self._queue: deque[tuple[Item, Future[Ready]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vlmbench-ahead")
        self._fill()

    def take(self, item: Item) -> Ready:
        """What `ready` gave for the item, or whatever it raised; items that were passed over are dropped.

        Raises `LookupError` for an item that is not to come any more.
        """
        while self._queue:
            found, future = self._queue.popleft()
            self._fill()
            if found is item:
                return future.result()
            future.cancel()
        raise LookupError(f"{item!r} is not ahead")

    def close(self) -> None:
        """Nothing further is begun; what is being done is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()

    def _fill(self) -> None:
        for item in self._items:
            self._queue.append((item, self._thread.submit(self._ready, item)))
            if len(self._queue) >= self._depth:
                return
