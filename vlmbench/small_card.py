"""A card made smaller than it is: what of a model fits, how torch is held to that, and how fast weights come from the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmbench import cost
from vlmbench.rounds import Clock, release

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter

GB = 10**9
SPARE = 2**29
"""Bytes of activations, workspaces and what the allocator rounds up."""
COPIES = 8
"""Matrices that the rate of the bus is taken over."""


def fits(adapter: ModelAdapter, limit: int, tokens: int) -> int:
    """Layers whose FFN stays on the card beside all other weights, two buffers, the cache and `SPARE`; below 0 for none."""
    ffns = [sum(each.nbytes for each in layer.mlp.parameters()) for layer in adapter.layers]
    held = {each.data_ptr(): each.nbytes for each in (*adapter.model.parameters(), *adapter.model.buffers())}
    rest = sum(held.values()) - sum(ffns) + 2 * max(ffns)
    rest += cost.kv_bytes(tokens, adapter.shapes, adapter.dtype.itemsize) + SPARE
    return (limit - rest) // max(ffns)


@contextmanager
def limited(device: torch.device, limit: int) -> Iterator[Any]:
    """At most `limit` bytes from torch's allocator meanwhile. Gives what says how many it had reserved; None on a CPU."""
    if device.type != "cuda":
        yield lambda: None
        return
    release()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        yield torch.cuda.max_memory_reserved
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def on_card(mlps: list[nn.Module], device: torch.device) -> Iterator[None]:
    """The matrices of these FFNs as copies on the card; those on the host come back afterwards."""
    places = [(owner, name) for mlp in mlps for owner in mlp.modules() for name in owner._parameters]
    host = [(owner, name, owner._parameters[name]) for owner, name in places]
    try:
        for owner, name, matrix in host:
            if matrix is not None:
                owner._parameters[name] = nn.Parameter(_copied(matrix.detach(), device), requires_grad=False)
        yield
    finally:
        for owner, name, matrix in host:
            owner._parameters[name] = matrix


def _copied(matrix: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(matrix, device=device).copy_(matrix)


def bus_rate(mlp: nn.Module, device: torch.device, clock: Clock) -> float:
    """Bytes a second from pinned memory to the card."""
    source = next(mlp.parameters()).detach()
    target = torch.empty_like(source, device=device)

    def copy() -> None:
        for _ in range(COPIES):
            target.copy_(source, non_blocking=True)

    copy()
    return COPIES * source.nbytes / clock(copy)
