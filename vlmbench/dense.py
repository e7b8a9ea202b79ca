"""Every dense attention that torch has here: the SDPA backends, and on CUDA FlexAttention compiled.

A method is held against the fastest of them; the names are those of the column `dense_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmbench.rounds import Clock, Side, fastest

SCORES_LIMIT = 2**28
"""Bytes of N² scores above which the kernel that writes them down is left out."""
RANKED = 2**17
"""Tokens above which kernels are not each timed: at a million one call takes ten seconds and more."""
TILE = 128
"""Rows and keys of a tile of FlexAttention's tables."""
_RANKS: dict[Any, tuple[dict[str, float], dict[str, str]]] = {}
"""What `ranked` found in this process: compiling and timing every kernel takes longer than many a row."""


def backends(device: torch.device, score_bytes: int) -> list[SDPBackend]:
    """SDPA backends worth trying on this device; which of them take a shape is found out by calling them."""
    found = [SDPBackend.FLASH_ATTENTION]
    if device.type == "cuda":
        found += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if score_bytes < SCORES_LIMIT:
        found.append(SDPBackend.MATH)
    return found


def label(backend: SDPBackend) -> str:
    return f"sdpa/{backend.name.lower()}"


def only(backend: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which SDPA dispatches to this backend or refuses."""
    return lambda: sdpa_kernel(backend)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def sides(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Side]:
    """Every causal kernel that may take these tensors. The matmul one only where its N² scores are small."""
    found = {
        label(backend): Side(label(backend), lambda _: causal_sdpa(q, k, v), around=only(backend))
        for backend in backends(q.device, q.shape[1] * q.shape[2] ** 2 * 4)
    }
    if q.device.type == "cuda":
        flex = Flex()
        found["flex"] = Side("flex", lambda _: flex(q, k, v), lambda _: flex.prepare(q.shape[2], q.device))
    return found


def ranked(q: Tensor, k: Tensor, v: Tensor, clock: Clock) -> tuple[list[Side], dict[str, float], dict[str, str]]:
    """`sides` that run, the fastest first, as `fastest` times them; at `RANKED` tokens where they are more.

    Tensors of the same shapes are ranked once a process.
    """
    all_of_it = sides(q, k, v)
    short = [x[:, :, :RANKED] for x in (q, k, v)]
    key = (q.device, q.dtype, *(x.shape for x in short))
    if key not in _RANKS:
        tried = all_of_it if q.shape[2] <= RANKED else sides(*short)
        _, seconds, refused = fastest(tried, clock)
        if not any("memory" in reason for reason in refused.values()):  # another time there may be enough
            _RANKS[key] = seconds, refused
    else:
        seconds, refused = _RANKS[key]
    return [all_of_it[name] for name in sorted(seconds, key=lambda name: seconds[name])], seconds, refused


class Flex:
    """Causal FlexAttention, its block mask made once a length. Compiled unless a test asks for the slow way."""

    def __init__(self, compiled: bool = True) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        # One graph a shape: a dynamic one is slower, and nobody would compare with it.
        self._attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        self._masks: dict[int, Any] = {}

    def prepare(self, n: int, device: torch.device) -> None:
        """Make the mask of a length outside the time: like a plan, it is the same in every layer."""
        if n not in self._masks:
            self._masks[n] = causal_mask(n, device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        self.prepare(n, q.device)
        return self._attend(q, k, v, block_mask=self._masks[n], enable_gqa=q.shape[1] != k.shape[1])

    def as_model_attention(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Any, None]:
        """For `Patcher.attention`; prefill from an empty cache only."""
        return self(q, k, v).transpose(1, 2).contiguous(), None


def causal_mask(n: int, device: torch.device) -> Any:
    """A `BlockMask` of n tokens: tiles before a row's own are whole, and the rule is asked in its own alone.

    Torch's maker has to be compiled for a prompt that is long, which at some lengths takes minutes (pytorch/pytorch#182060).
    """
    from torch.nn.attention.flex_attention import BlockMask

    number = torch.arange(-(-n // TILE), dtype=torch.int32, device=device)
    own = ((number[:, None] + number) % len(number)).int()[None, None]  # of each row only the first counts
    before = number.expand_as(own).contiguous()
    counts = torch.ones_like(number)[None, None], number[None, None]
    options: dict[str, Any] = {"BLOCK_SIZE": TILE, "mask_mod": _causal, "seq_lengths": (n, n)}
    return BlockMask.from_kv_blocks(counts[0], own, counts[1], before, **options)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
