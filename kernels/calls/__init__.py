"""Attention calls that sparse patterns are made of: each hands out its log-sum-exp and adds its pairs to a tally."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.dense import Attended, join_into

__all__ = [
    "LAST",
    "Attended",
    "Tally",
    "attend",
    "causal_rows",
    "join_into",
    "last_weights",
    "native",
    "reference",
    "take",
]

LAST = 64
"""Queries at the end of a prompt that an online index is estimated from (MMInference, algorithm 1)."""


@dataclass
class Tally:
    """Query-key pairs, summed over heads: of softmax attention, and of scores that only chose what to attend to."""

    pairs: int = 0
    """That causality and masks let through; rows that are computed again elsewhere count again."""
    computed: int = 0
    """That were multiplied: a masked call's whole rectangle, a causal one's triangle as for dense attention."""
    scores: int = 0
    dry: bool = False
    """Count and compute nothing: outputs hold whatever memory held."""
    written: bool = False
    """Whether any scores were written out for want of a kernel: then time and memory are not the pattern's."""

    def launched(self, pairs: int) -> None:
        """By a kernel of the GPU, whose tiles' corners count as little as dense attention's."""
        self.pairs += pairs
        self.computed += pairs


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tally: Tally,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Attended:
    """``q [B, H, n, D]``, ``k, v [B, Hkv, m, D]`` of any strides; `causal` needs n = m.

    `mask` is boolean and broadcasts to ``[B, H, n, m]``; a row without an allowed key gets zeros and a log-sum-exp of -inf.
    """
    batch, heads, n, _ = q.shape
    m = k.shape[2]
    kernel = native(q)
    triangle = batch * heads * (n * (n + 1) // 2 if causal else n * m)
    tally.pairs += triangle if mask is None else int(mask.sum()) * (batch * heads * n * m // mask.numel())
    launched = None if kernel or tally.dry or mask is not None else _launched(q, k, v, causal=causal, scale=scale)
    tally.computed += triangle if kernel or launched is not None else batch * heads * n * m
    if launched is not None:
        return launched
    if tally.dry:
        return Attended(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
    tally.written |= not kernel
    k, v = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    if kernel:
        # The kernel behind SDPA on the CPU, by its own name: SDPA does not hand out the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        lse = lse.float()
    else:
        scores = (q @ k.transpose(-1, -2)).float() * scale
        if causal:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        if bias is not None:
            scores = scores + bias
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    if mask is not None and bool((empty := ~mask.any(-1)).any()):  # what kernels leave in such rows differs
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, float("-inf"))
    return Attended(out, lse)


def native(q: Tensor) -> bool:
    """Whether plain calls are the fast way here, so that their time is the pattern's own."""
    return q.device.type == "cpu" and q.dtype != torch.float16


def _launched(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Attended | None:
    """By the kernel of `sparse_lines` where the device has nothing better; None when it refuses."""
    from vlmbench.kernels.sparse_lines import fused  # it imports this package

    if not fused.preferred(q.device):
        return None
    try:
        return fused.dense(q, k, v, causal=causal, scale=scale)
    except fused.Refused as refused:
        fused.warn(refused)
        return None


def causal_rows(q: Tensor, k: Tensor, v: Tensor, first: int, stop: int, *, scale: float, tally: Tally) -> Attended:
    """Rows ``[first, stop)`` of ``q [B, H, N, D]`` over every key up to their own of ``k, v [B, Hkv, N, D]``."""
    rows = q[:, :, first:stop]
    own = attend(rows, k[:, :, first:stop], v[:, :, first:stop], scale=scale, tally=tally, causal=True)
    if first == 0 or stop == first:
        return own
    far = attend(rows, k[:, :, :first], v[:, :, :first], scale=scale, tally=tally)
    out = torch.empty_like(own.out)
    return Attended(out, join_into(out, own, far))


def take(x: Tensor, rows: Tensor) -> Tensor:
    """``x [H, N, D]`` at the int64 indices ``rows [H, ...]`` of each head: ``[H, ..., D]``, whole rows copied at a time."""
    heads = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (rows.dim() - 1))
    if x.stride(1) >= x.stride(0):  # heads behind tokens, as models hand them over
        flat, index = x.transpose(0, 1).reshape(-1, x.shape[2]), rows * x.shape[0] + heads
    else:
        flat, index = x.reshape(-1, x.shape[2]), heads * x.shape[1] + rows
    return flat.index_select(0, index.flatten()).view(*rows.shape, x.shape[2])


def last_weights(q: Tensor, k: Tensor, *, scale: float, tally: Tally, last: int = LAST) -> Tensor:
    """Softmax in float32 of the last min(`last`, n) queries of ``q [B, H, n, D]`` over ``k [B, Hkv, N, D]``.

    Returns ``[B, H, L, N]``, causal: query l is token N - L + l. ``Hkv`` divides H. Of the queries only the last are needed.
    """
    batch, heads, rows, dim = q.shape
    n, length = k.shape[2], min(last, rows)
    # Queries of heads that share keys are one matrix: keys are never repeated.
    grouped = q[:, :, rows - length :].reshape(batch, k.shape[1], -1, dim).float()
    scores = (grouped @ k.transpose(-1, -2).float()).mul_(scale).view(batch, heads, length, n)
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores[..., n - length :].masked_fill_(later, float("-inf"))
    tally.scores += batch * heads * (length * (n - length) + length * (length + 1) // 2)
    return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)  # no fresh memory


def reference(q: Tensor, k: Tensor, v: Tensor, allow: Tensor, *, scale: float | None = None) -> Tensor:
    """Dense attention under a mask, in float64: ``q [B, H, N, D]``, ``k, v [B, Hkv, N, D]``, `allow` to ``[B, H, N, N]``."""
    groups = q.shape[1] // k.shape[1]
    wide, values = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ wide.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~allow, float("-inf")).softmax(-1) @ values).to(q.dtype)
