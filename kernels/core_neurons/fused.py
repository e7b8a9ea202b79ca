"""Core neurons on a GPU: what the kernels of `fused_kernel` take, what they refuse, and how they are launched.

Everything has a shape that is known on the host, and nothing is asked of the device: a CUDA graph holds a decoding step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.fused import DTYPES, Refused, interpreted, no_kernel
from vlmbench.kernels.core_neurons.count import Counts, wanted

__all__ = ["PADDED", "Refused", "Tile", "core_counts", "ffn", "ffn_refusal", "refusal"]

PADDED = 16
"""Numbers to a multiple of which the copied rows of down are filled with zeros: so each begins on 32 bytes."""
MOST_ROWS = 8
"""Rows of x; they are multiplied one after the other, while the weights are at hand."""
MOST_NEURONS = 2**15
"""A row of activations is held in registers, 64 numbers a thread."""
SILU = ("silu", "SiLU", "SiLUActivation")
"""torch's function and module, and transformers'."""
PARTS = 16
"""Parts of the tokens that are counted apart, so that the device is busy; their sums are joined in order."""


class Tile(NamedTuple):
    """A tiling fixed by hand, instead of the tuned one."""

    rows: int
    """Of a matrix, for one program."""
    columns: int
    """Numbers of each at a time."""
    warps: int = 4


def ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor, act: Callable[[Tensor], Tensor],
    *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """``down · (silu(gate[neurons] · x) ⊙ (up[neurons] · x))`` of ``x [..., C]``, rounded once, at the end.

    ``gate, up [D, C]``, ``neurons`` int32 ``[K]``; ``down [C, P]`` are their columns of the down projection, then zeros up to
    a multiple of `PADDED`. Raises `Refused` for what the kernels cannot take.
    """
    if reason := ffn_refusal(x, gate, up, down, act):
        raise Refused(f"The gathered FFN's kernel cannot run: {reason}.")
    from vlmbench.kernels.core_neurons import fused_kernel

    # Through torch, so that whoever records this (`graphs.Outside`) sees what a launch reads and keeps it alive.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    rows, gate, up, down, neurons = (each.detach() for each in (rows, gate, up, down, neurons))
    batch, width = rows.shape
    inner = torch.empty((batch, down.shape[1]), dtype=torch.float32, device=x.device)
    out = torch.empty((batch, width), dtype=x.dtype, device=x.device)
    # Triton 3.10 no longer fuses a multiplication with an addition by itself; the kernel counts on it.
    options: dict[str, Any] = {"B": batch, "BB": 1 << (batch - 1).bit_length(), "enable_fp_fusion": True}
    if tile is None and interpreted():
        tile = Tile(4, 64)  # nothing to tune
    numbers = (width, len(neurons), down.shape[1], rows.stride(0), gate.stride(0), up.stride(0))
    with _on(x.device):
        if tile is None:
            fused_kernel.inner_fwd[lambda meta: (-(-down.shape[1] // meta["BR"]),)](
                rows, gate, up, neurons, inner, *numbers, **options
            )
            fused_kernel.down_fwd[lambda meta: (-(-width // meta["BR"]),)](
                inner, down, out, width, down.shape[1], out.stride(0), **options
            )
        else:
            options |= {"BR": tile.rows, "BC": tile.columns, "num_warps": tile.warps}
            fused_kernel.inner_fwd_kernel[(-(-down.shape[1] // tile.rows),)](
                rows, gate, up, neurons, inner, *numbers, **options
            )
            fused_kernel.down_fwd_kernel[(-(-width // tile.rows),)](
                inner, down, out, width, down.shape[1], out.stride(0), **options
            )
    return out.view(x.shape)


def ffn_refusal(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> str | None:
    """Why the kernels cannot take this FFN; None when they can."""
    if reason := no_kernel(x.device):
        return reason
    if x.dtype not in DTYPES or {gate.dtype, up.dtype, down.dtype} != {x.dtype}:
        names = ", ".join(str(each.dtype).removeprefix("torch.") for each in (x, gate, up, down))
        return f"x, gate, up and down are {names}, and it takes bfloat16, float16 or float32, the same for all"
    if _name(act) not in SILU:
        return f"it knows SiLU alone, not {_name(act)}"
    if (rows := x.numel() // x.shape[-1]) > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows of x, not {rows}"
    if gate.stride(-1) != 1 or up.stride(-1) != 1:
        return "a neuron's weights do not lie side by side in memory"
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, gate, up, down)):
        return "a gradient is asked for, and it has none"
    return None


def core_counts(activations: Tensor, rho: float) -> Counts:
    """`count.core_counts` of ``activations [M, D]`` in two launches: each row's threshold, then columns. NaN never votes.

    Raises `Refused` for what the kernels cannot take.
    """
    if reason := refusal(activations):
        raise Refused(f"The kernel of core neurons cannot run: {reason}.")
    from vlmbench.kernels.core_neurons import fused_kernel

    tokens, width = activations.shape
    device, stride = activations.device, activations.stride(0)
    block = max(16, 1 << (width - 1).bit_length())
    rows = -(-tokens // min(PARTS, -(-tokens // 64)))
    parts = -(-tokens // rows)
    least = torch.empty(tokens, dtype=torch.int32, device=device)
    votes = torch.empty((parts, width), dtype=torch.int32, device=device)
    sums = torch.empty((parts, width), dtype=torch.float32, device=device)
    low = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[activations.dtype]
    table = _wanted(width, rho, device)
    with _on(device):
        fused_kernel.least_fwd_kernel[(tokens,)](
            activations, table, least, width, stride, LOW=low, BD=block, num_warps=min(32, max(4, block // 2048))
        )
        fused_kernel.column_fwd_kernel[(-(-width // 128), parts)](
            activations, least, votes, sums, tokens, width, rows, stride, BM=16, BN=128, num_warps=4
        )
    return Counts(votes.sum(0, dtype=torch.int32), sums.sum(0))


def refusal(activations: Tensor) -> str | None:
    """Why the kernels cannot count these activations; None when they can."""
    if reason := no_kernel(activations.device):
        return reason
    if activations.dtype not in DTYPES:
        name = str(activations.dtype).removeprefix("torch.")
        return f"activations are {name}, and it takes bfloat16, float16 or float32"
    if activations.shape[1] > MOST_NEURONS:
        return f"a layer has {activations.shape[1]} neurons, and it takes at most {MOST_NEURONS}"
    if activations.stride(1) != 1:
        return "a token's activations do not lie side by side in memory"
    return None


@lru_cache(maxsize=16)
def _wanted(width: int, rho: float, device: torch.device) -> Tensor:
    """int32 ``[D + 1]``: of how many positive entries how many are core; a float of Triton's is too short to say."""
    return wanted(torch.arange(width + 1, device=device), rho).int()


def _name(act: Callable[[Tensor], Tensor]) -> str:
    return getattr(act, "__name__", type(act).__name__)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
