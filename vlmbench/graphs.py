"""A call recorded once and replayed without its Python: a CUDA graph, and what stands in for one on a CPU.

A replay does the device's work of the recorded call again, on the very tensors that it touched: numbers that the host gave
stay what they were, shapes too. So whoever replays writes new inputs into the tensors of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmbench.rounds import first_line, out_of_memory

aten = torch.ops.aten


class NotRecordedError(RuntimeError):
    """The call cannot be replayed; the message says why."""


class Recorded(NamedTuple):
    replay: Callable[[], Any]
    result: Any
    """What the call returned: each replay writes it anew, and so may the next recording of the same recorder."""
    held: Any = None
    """What replays read and the recording does not keep alive by itself."""


class Recorder(Protocol):
    def record(self, call: Callable[[], Any]) -> Recorded:
        """`call` has run at least once before: what happens only once is not recorded. Raises `NotRecordedError`."""
        ...


def recorder(device: torch.device) -> Recorder:
    """One whose recordings share their temporary memory, so they are replayed in order and not side by side."""
    return CudaGraphs() if device.type == "cuda" else Tape()


class CudaGraphs:
    """Recordings are CUDA graphs over one pool of memory.

    After a failure torch's random numbers on the device may be unusable (their state stays that of the capture): finish
    what is under way and begin other work in another process. `failed` says whether that happened.
    """

    failed = False

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Any]) -> Recorded:
        stream, graph, outside = torch.cuda.current_stream(), torch.cuda.CUDAGraph(), Outside()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"), outside:
                result = call()
        except RuntimeError as error:
            CudaGraphs.failed = True
            torch.cuda.set_stream(stream)  # which the context leaves behind when the capture's end fails too
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error  # what came first
            if out_of_memory(cause):
                raise cause from None
            raise NotRecordedError(f"no CUDA graph could be made of it ({first_line(cause)})") from None
        return Recorded(graph.replay, result, outside.held)


class Tape:
    """Recordings are lists of operations: they rehearse on a CPU what a CUDA graph does, and are no faster."""

    def record(self, call: Callable[[], Any]) -> Recorded:
        tape = _Operations()
        with tape:
            result = call()
        return Recorded(tape.replay, result)


HOST = frozenset(
    {
        aten._local_scalar_dense.default,
        aten._unique2.default,
        aten.equal.default,
        aten.is_nonzero.default,
        aten.item.default,
        aten.lift_fresh.default,
        aten.masked_select.default,
        aten.nonzero.default,
        aten.repeat_interleave.self_Tensor,
        aten.repeat_interleave.Tensor,
        aten.unique_consecutive.default,
        aten.where.default,
    }
)
"""What makes the host wait for the device, or hands over numbers of the host: a stream under capture refuses it."""

INDEXED = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})
"""The same when an index is a mask: how many it chooses is known on the device alone."""


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST or (func in INDEXED and any(_is_mask(leaf) for leaf in tree_leaves(args[1]))):
            raise NotRecordedError(f"it makes the host and the device wait for each other ({func})")
        out = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Every operation again; what it made goes where it went the first time."""
        for func, args, kwargs, out in self._done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _address(old) != _address(new):
                    old.copy_(new)


class Outside(TorchDispatchMode):
    """Collects the tensors that a call uses and did not make: a CUDA graph knows their addresses alone."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and _storage(leaf) not in self._made:
                self.held.setdefault(_storage(leaf), leaf)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in self.held:  # a view of what was there is not made
                self._made.add(_storage(leaf))
        return out


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
