"""FFN matrices that do not fit the device: they stay on the host, pinned, and come when their layer runs.

Plain: a layer waits for its own copy. Prefetched: layer l + 1 is copied on a side stream into a second buffer while l computes,
so that only the slower of the two is waited for. On a CPU there is no other device: the copies are made all the same, one
after the other, so that what is computed from them can be tested; their time there says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vlmbench.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmbench.models.base import ModelAdapter
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


def check_resident(name: str, resident: int | None, adapter: ModelAdapter) -> None:
    """Refuse a number of layers that leaves nothing on the host."""
    if resident is not None and resident >= adapter.shapes.layers:
        raise UsageError(
            f"{name}:resident={resident} leaves nothing on the host: the model has {adapter.shapes.layers} layers; give fewer."
        )


def stream(patch: Patcher, trace: Trace, layers: Sequence[int], *, prefetch: bool, again: bool) -> None:
    """Through `patch`: the FFNs of these layers of the language model run from copies.

    With `again` the last one's turn also fetches the first one's, which the next token needs. Bytes go to the trace: those that
    stay on the host, and those copied in prefill and in decoding.
    """
    mlps = [patch.adapter.layers[index].mlp for index in layers]
    for mlp in mlps:
        patch.on_host(mlp)
    run = _Stream(mlps, patch.adapter.device, prefetch, again, trace)
    patch.pre(patch.adapter.text, run.begin)
    for place, mlp in enumerate(mlps):
        patch.forward(mlp, partial(run.forward, place, mlp.forward))


class _Stream:
    """Two buffers, each with the place whose matrices it holds; one where nothing is prefetched."""

    def __init__(
        self, mlps: Sequence[nn.Module], device: torch.device, prefetch: bool, again: bool, trace: Trace
    ) -> None:
        self._owners = [_parameters(mlp) for mlp in mlps]
        self._host = [[getattr(owner, name) for owner, name in each] for each in self._owners]
        self._device, self._prefetch, self._again, self._trace = device, prefetch and len(mlps) > 1, again, trace
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and self._prefetch else None
        self._buffers: dict[int, list[Tensor]] = {}
        self._holds: dict[int, int] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._read: dict[int, torch.cuda.Event] = {}
        self._last = 0
        self._phase = "prefill_bytes"

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs.get("vlmbench_layout") is None:
            self._phase = "decode_bytes"
            return
        self._phase = "prefill_bytes"
        self._holds.clear()  # a new sample pays for all of its copies
        host = sum(each.nbytes for layer in self._host for each in layer)
        self._trace.facts["offload"] = {"host_bytes": host, "prefill_bytes": 0, "decode_bytes": 0}

    def forward(self, place: int, dense: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        slot = next((slot for slot, held in self._holds.items() if held == place), None)
        if slot is None:
            slot = 1 - self._last if self._prefetch else 0
            self._copy(place, slot)
        if slot in self._copied:
            torch.cuda.current_stream(self._device).wait_event(self._copied[slot])
        self._last, after = slot, place + 1
        if self._prefetch and (self._again or after < len(self._host)):
            self._copy(after % len(self._host), 1 - slot)
        try:
            self._put(place, self._buffers[slot])
            return dense(x)
        finally:
            self._put(place, self._host[place])
            if self._side is not None:
                self._read[slot] = torch.cuda.current_stream(self._device).record_event()

    def _copy(self, place: int, slot: int) -> None:
        if self._holds.get(slot) == place:
            return
        source = self._host[place]
        if slot not in self._buffers:
            self._buffers[slot] = [torch.empty_like(each, device=self._device) for each in source]
            if self._side is not None:  # the last copy of a sample may still be under way when a method leaves
                for each in self._buffers[slot]:
                    each.record_stream(self._side)
        if self._side is None:
            self._move(source, slot)
        else:
            now = torch.cuda.current_stream(self._device)
            self._side.wait_event(self._read[slot] if slot in self._read else now.record_event())
            with torch.cuda.stream(self._side):
                self._move(source, slot)
                self._copied[slot] = self._side.record_event()
        self._holds[slot] = place
        self._trace.facts["offload"][self._phase] += sum(each.nbytes for each in source)

    def _put(self, place: int, matrices: Sequence[Tensor]) -> None:
        """In the parameters' place: what looks into the module while it runs finds what it runs on."""
        for (owner, name), matrix in zip(self._owners[place], matrices, strict=True):
            owner._parameters[name] = matrix  # type: ignore[assignment]

    def _move(self, source: Sequence[Tensor], slot: int) -> None:
        for there, host in zip(self._buffers[slot], source, strict=True):
            there.copy_(host, non_blocking=True)


def _parameters(mlp: nn.Module) -> list[tuple[nn.Module, str]]:
    """(the module that holds it, its name there) of every parameter, by name: modules may be registered in any order."""
    owners = sorted(mlp.named_modules(), key=lambda named: named[0])
    found = ((owner, name, each) for _, owner in owners for name, each in sorted(owner._parameters.items()))
    return [(owner, name) for owner, name, each in found if each is not None]
