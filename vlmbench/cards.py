"""Published numbers of cards that people rent: what `plan` holds a stage against.

Dense rates (datasheets print the sparse figure, twice as high, in larger type), bandwidth, and memory in units of 10⁹ bytes.
A card shows a little more memory than that, which the CUDA context and fragmentation take.

Their standing: NVIDIA's own datasheets and white papers, as named below, were not at hand when this was written. The numbers
are from memory and were compared with what resellers and other third parties quote of them; none was measured, except
that an H200 gave 788 TFLOP/s in a bf16 product and 4.3 TB/s in a copy (`bench` measures both for its own shares).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vlmbench.errors import UsageError
from vlmbench.spec import nearest

if TYPE_CHECKING:
    import torch


class Card(NamedTuple):
    flops_per_s: float
    """Matrix products in bf16 or fp16, float32 accumulation."""
    float32_flops_per_s: float
    """In float32 on the ordinary units: torch uses TF32 only where it is told to."""
    bytes_per_s: float
    memory_bytes: int

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in this type."""
        return self.float32_flops_per_s if dtype.itemsize == 4 else self.flops_per_s


CARDS: dict[str, Card] = {
    # NVIDIA H200 datasheet, SXM column: 1,979 TFLOPS bf16 with sparsity, 67 fp32, 4.8 TB/s, 141 GB.
    "h200": Card(989.4e12, 67e12, 4.8e12, 141 * 10**9),
    # NVIDIA H100 datasheet, SXM column: 1,979 TFLOPS bf16 with sparsity, 67 fp32, 3.35 TB/s, 80 GB.
    "h100": Card(989.4e12, 67e12, 3.35e12, 80 * 10**9),
    # NVIDIA A100 datasheet, 80 GB SXM: 312 TFLOPS bf16, 19.5 fp32, 2,039 GB/s.
    "a100-80g": Card(312e12, 19.5e12, 2.039e12, 80 * 10**9),
    # NVIDIA A100 datasheet, 40 GB SXM: 312 TFLOPS bf16, 19.5 fp32, 1,555 GB/s.
    "a100-40g": Card(312e12, 19.5e12, 1.555e12, 40 * 10**9),
    # NVIDIA L40S datasheet: 362.05 TFLOPS bf16 without sparsity, 91.6 fp32, 864 GB/s, 48 GB.
    "l40s": Card(362.05e12, 91.6e12, 0.864e12, 48 * 10**9),
    # NVIDIA Ada GPU architecture whitepaper, RTX 4090: 165.2 TFLOPS bf16 with fp32 accumulation, 82.6 fp32, 1,008 GB/s, 24 GB.
    "4090": Card(165.2e12, 82.6e12, 1.008e12, 24 * 10**9),
}


def card(name: str) -> Card:
    """Raises `UsageError` with the known names."""
    if name.lower() not in CARDS:
        known = ", ".join(CARDS)
        raise UsageError(f"No card is called {name!r}; known are {known}.{nearest(name.lower(), CARDS)}")
    return CARDS[name.lower()]
