"""Bytes of live tensor storages on one device, followed operation by operation (for devices whose allocator keeps no count).

torch ships a tracker of this kind (``MemTracker``), built for training: it refuses a second call of the same module, and
decoding is nothing but that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts every storage that an operation returned while the mode was on, once, until it is freed.

    `known` storages (weights) are counted from the start, so that views of them add nothing.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.current = 0
        self.peak = 0
        for tensor in known:
            self._add(tensor)

    def restart_peak(self) -> None:
        """A new stage: its peak begins at what is live now."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()

        def freed(_: object, key: int = key) -> None:
            _, gone = self._live.pop(key)
            self.current -= gone

        self._live[key] = (weakref.ref(storage, freed), size)
        self.current += size
        self.peak = max(self.peak, self.current)
