"""The Triton kernels of core neurons: an FFN's rows read by index, and votes by an exact threshold. See the README beside it.

Imported only by `fused`, when a kernel is first used: this module needs triton.
"""

# mypy: allow-untyped-defs
# (the parameters of a kernel are pointers and numbers that triton types itself)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "TILES",
    "column_fwd_kernel",
    "down_fwd",
    "down_fwd_kernel",
    "inner_fwd",
    "inner_fwd_kernel",
    "least_fwd_kernel",
]

NONE: tl.constexpr = tl.constexpr(2**31 - 1)
"""The threshold of a row that nothing reaches."""

TILES = [  # rows of a matrix, and numbers of each, at a time
    triton.Config({"BR": br, "BC": bc}, num_warps=warps)
    for br, bc, warps in ((4, 1024, 4), (4, 512, 4), (8, 512, 4), (8, 512, 8), (2, 1024, 2), (1, 2048, 4), (16, 256, 4))
]


@triton.jit
def _add(b_s, b_w, b_x, o_b, b: tl.constexpr, B: tl.constexpr):
    """The rows of ``b_w [BR, BC]`` times row `b` of x, ``[BC]``: of one row their products, added up behind the loop."""
    if B == 1:
        b_s += b_w * b_x[None, :]
    else:
        b_s += tl.where(o_b[None, :] == b, tl.sum(b_w * b_x[None, :], 1)[:, None], 0.0)
    return b_s


@triton.jit
def _sums(b_s, B: tl.constexpr):
    return tl.sum(b_s, 1)[:, None] if B == 1 else b_s


@triton.jit
def inner_fwd_kernel(
    x, gate, up, neurons, inner, C, K, KP, stride_xb, stride_gn, stride_un,
    B: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``silu(gate x) * (up x)`` of BR neurons and all B rows of x, in float32; zeros from neuron K to KP."""
    o_k = tl.program_id(0) * BR + tl.arange(0, BR)
    m_k = o_k < K
    o_n = tl.load(neurons + o_k, mask=m_k, other=0).to(tl.int64)  # offsets count elements and may pass 2**31
    o_b = tl.arange(0, BB)
    b_g = tl.zeros([BR, BC if B == 1 else BB], dtype=tl.float32)
    b_u = tl.zeros([BR, BC if B == 1 else BB], dtype=tl.float32)
    for i in range(0, C, BC):
        o_c = i + tl.arange(0, BC)
        m_c = o_c < C
        m_w = m_k[:, None] & m_c[None, :]
        b_wg = tl.load(gate + (o_n * stride_gn)[:, None] + o_c[None, :], mask=m_w, other=0.0).to(tl.float32)  # [BR, BC]
        b_wu = tl.load(up + (o_n * stride_un)[:, None] + o_c[None, :], mask=m_w, other=0.0).to(tl.float32)
        for b in tl.static_range(B):
            b_x = tl.load(x + b * stride_xb + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_g = _add(b_g, b_wg, b_x, o_b, b, B)
            b_u = _add(b_u, b_wu, b_x, o_b, b, B)
    b_g = _sums(b_g, B)
    b_i = b_g / (1.0 + tl.exp(-b_g)) * _sums(b_u, B)
    p_i = inner + o_b[None, :] * KP + o_k[:, None]
    tl.store(p_i, b_i, mask=(o_k < KP)[:, None] & (o_b < B)[None, :])


@triton.jit
def down_fwd_kernel(
    inner, down, out, C, KP, stride_ob, B: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """``down inner`` of BR outputs and all B rows; ``down [C, KP]`` and ``inner [B, KP]`` have no gaps."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < C
    o_b = tl.arange(0, BB)
    b_o = tl.zeros([BR, BC if B == 1 else BB], dtype=tl.float32)
    p_w = down + (o_r.to(tl.int64) * KP)[:, None]
    for i in range(0, KP, BC):
        o_k = i + tl.arange(0, BC)
        m_k = o_k < KP
        b_w = tl.load(p_w + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0).to(tl.float32)  # [BR, BC]
        for b in tl.static_range(B):
            b_i = tl.load(inner + b * KP + o_k, mask=m_k, other=0.0)
            b_o = _add(b_o, b_w, b_i, o_b, b, B)
    p_o = out + o_b[None, :] * stride_ob + o_r[:, None]
    tl.store(p_o, _sums(b_o, B).to(out.dtype.element_ty), mask=m_r[:, None] & (o_b < B)[None, :])


@triton.jit
def _order(b_a):
    """int32 that are ordered as positive float32 are; 0 for what is not above 0, NaN included."""
    b_k = b_a.to(tl.int32, bitcast=True)
    return tl.where((b_k > 0) & (b_k <= 0x7F800000), b_k, 0)  # up to infinity


@triton.jit
def least_fwd_kernel(a, wanted, least, D, stride_am, LOW: tl.constexpr, BD: tl.constexpr):
    """The order (`_order`) of a row's least core activation, one program for each row; NONE where nothing is above 0.

    Of p positive entries it is the ``wanted[p]``-th largest: bit by bit from the highest the largest number that so many of
    them reach. Bits below LOW are 0 in the dtype of `a`.
    """
    i_m = tl.program_id(0)
    o_n = tl.arange(0, BD)
    b_a = tl.load(a + i_m.to(tl.int64) * stride_am + o_n, mask=o_n < D, other=0.0)  # [BD]
    b_k = _order(b_a.to(tl.float32))
    positive = tl.sum((b_k > 0).to(tl.int32), 0)
    n = tl.load(wanted + positive)
    found = 0
    for i in range(31 - LOW):
        tried = found | (1 << (30 - i))
        reached = tl.sum((b_k >= tried).to(tl.int32), 0)
        found = tl.where(reached >= n, tried, found)
    tl.store(least + i_m, tl.where(positive > 0, found, NONE))


@triton.jit
def column_fwd_kernel(a, least, votes, sums, M, D, rows, stride_am, BM: tl.constexpr, BN: tl.constexpr):
    """Of BN neurons and `rows` tokens: in how many it is core, and its positive activations in the order of tokens.

    Part i of the tokens is row i of `votes` and `sums`.
    """
    i_p = tl.program_id(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < D
    stop = tl.minimum((i_p + 1) * rows, M)
    b_v = tl.zeros([BM, BN], dtype=tl.int32)
    b_s = tl.zeros([BM, BN], dtype=tl.float32)
    for i in range(i_p * rows, stop, BM):
        o_m = i + tl.arange(0, BM)
        m_m = o_m < stop
        p_a = a + (o_m.to(tl.int64) * stride_am)[:, None] + o_n[None, :]
        b_a = tl.load(p_a, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)  # [BM, BN]
        b_k = _order(b_a)
        b_l = tl.load(least + o_m, mask=m_m, other=NONE)
        b_v += (b_k >= b_l[:, None]).to(tl.int32)
        b_s += tl.where(b_k > 0, b_a, 0.0)
    p_p = i_p.to(tl.int64) * D + o_n
    tl.store(votes + p_p, tl.sum(b_v, 0), mask=m_n)
    tl.store(sums + p_p, tl.sum(b_s, 0), mask=m_n)


# Triton keeps the timings with its compiled kernels (TRITON_CACHE_DIR, ~/.triton/cache by default), under a key of its own
# version, this source, the card's architecture, and the dtypes and arguments named here.
inner_fwd = triton.autotune(TILES, key=["C", "KP", "B"], cache_results=True)(inner_fwd_kernel)
down_fwd = triton.autotune(TILES, key=["C", "KP", "B"], cache_results=True)(down_fwd_kernel)
