"""The same attention through three dense calls over packed sequences, joined by log-sum-exp; `blocks` is its CPU cousin.

There to be compared with `fused` on a GPU; whichever is slower goes. On CUDA a call is torch's variable-length flash
attention (bf16 or fp16); elsewhere one dense call a sequence, which is for tests.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmbench.kernels.block_attention.dense import Attended, attend, join_into
from vlmbench.kernels.block_attention.plan import Plan
from vlmbench.kernels.block_attention.remembered import remembered
from vlmbench.kernels.block_attention.tiles import check_shapes, regions


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]`` with H a multiple of Hkv; returns ``[1, H, N, D]``."""
    check_shapes(q, k, v, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [N, H, D]
    edges = (0, *(region.stop for region in regions(plan)))
    out, lse = _attend(q, k, v, edges, edges, causal=True, scale=scale)  # every region with itself
    for rows, keys in (((plan.sink, plan.tail), (0, plan.sink)), ((plan.tail, plan.length), (0, plan.tail))):
        there, seen = slice(*rows), slice(*keys)
        if rows[1] > rows[0] and keys[1] > keys[0]:
            far = _attend(q[there], k[seen], v[seen], (0, rows[1] - rows[0]), (0, keys[1]), causal=False, scale=scale)
            join_into(out[there], (out[there], lse[there]), far)
    return out.transpose(0, 1)[None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_edges: tuple[int, ...], k_edges: tuple[int, ...], *, causal: bool, scale: float
) -> Attended:
    """``q [n, H, D]``, ``k, v [m, Hkv, D]``, sequences packed between edges; returns ``[n, H, D]`` and ``[n, H]``."""
    if not q.is_cuda:
        return _one_by_one(q, k, v, q_edges, k_edges, causal=causal, scale=scale)
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    longest = [max(b - a for a, b in pairwise(edges)) for edges in (q_edges, k_edges)]
    options: dict[str, Any] = {"return_aux": AuxRequest(lse=True), "scale": scale}
    options["window_size"] = (-1, 0) if causal else (-1, -1)
    if _names_gqa():
        options["enable_gqa"] = True
    out, lse = varlen_attn(q, k, v, _on(q_edges, q.device), _on(k_edges, q.device), *longest, **options)
    return Attended(out, lse.transpose(0, 1))  # it hands out [H, n]


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, q_edges: tuple[int, ...], k_edges: tuple[int, ...], *, causal: bool, scale: float
) -> Attended:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    parts = []
    for (a, b), (c, d) in zip(pairwise(q_edges), pairwise(k_edges), strict=True):
        rows = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        parts.append(attend(*rows, causal=causal, scale=scale))
    out = torch.cat([part.out for part in parts], 2)[0].transpose(0, 1).contiguous()
    return Attended(out, torch.cat([part.lse for part in parts], 2)[0].transpose(0, 1))


@remembered(maxsize=32)
def _on(edges: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(edges, dtype=torch.int32, device=device)


@cache
def _names_gqa() -> bool:
    """Early versions of the call group heads unasked and have no word for it."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters
