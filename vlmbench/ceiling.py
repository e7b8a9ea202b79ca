"""What this device reaches on the simplest work there is: the rate of a large matrix product and of a large copy.

Random data: on zeros a card clocks higher. Best of several, since a ceiling is what is possible.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from vlmbench.rounds import Clock

REPEATS = 5


class Ceiling(NamedTuple):
    flops_per_s: float
    bytes_per_s: float
    """Bytes read plus bytes written."""


@lru_cache
def measure(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Measured once a process for a device and dtype."""
    big = device.type == "cuda"
    side, calls = (8192, 10) if big else (1024, 1)
    clock = Clock(device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(calls):
            torch.mm(a, b, out=product)

    multiply()
    flops_per_s = calls * 2 * side**3 / min(clock(multiply) for _ in range(REPEATS))
    source = torch.randint(-9, 9, (2**31 if big else 2**27,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(calls):
            target.copy_(source)

    copy()
    return Ceiling(flops_per_s, calls * 2 * source.numel() / min(clock(copy) for _ in range(REPEATS)))
