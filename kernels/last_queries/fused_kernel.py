"""The Triton kernels of the last queries: two walks along the keys, the second with weights that add up to one. See the README.

Imported only by `fused`, when a kernel is first used: this module needs triton.
"""

# mypy: allow-untyped-defs
# (the parameters of a kernel are pointers and numbers that triton types itself)

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

__all__ = ["OutOfResources", "lse_kernel", "sums_kernel"]

ROWS = tl.constexpr(64)
"""Rows of a program: the last queries of one head, or fewer."""


@triton.jit
def _queries(q, i_b, i_h, L, stride_qb, stride_qh, stride_qn, D: tl.constexpr, BD: tl.constexpr):
    """``[ROWS, BD]``"""
    o_l, o_d = tl.arange(0, ROWS), tl.arange(0, BD)
    p_q = q + i_b * stride_qb + i_h * stride_qh + (o_l.to(tl.int64) * stride_qn)[:, None] + o_d[None, :]
    return tl.load(p_q, mask=(o_l < L)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _keys(k, o_j, N, stride_kn, D: tl.constexpr, BD: tl.constexpr):
    """``[BN, BD]``, zeros where there is no key."""
    o_d = tl.arange(0, BD)
    m_k = ((o_j >= 0) & (o_j < N))[:, None] & (o_d < D)[None, :]
    # Offsets count elements and pass 2**31 in prompts of a million tokens.
    return tl.load(k + (o_j.to(tl.int64) * stride_kn)[:, None] + o_d[None, :], mask=m_k, other=0.0)


@triton.jit
def lse_kernel(
    q, k, heads, parts, scale, N, L, n_heads, n_programs, n_parts, n_tiles,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`parts` ``[B, h, S, ROWS]``: each row's log-sum-exp over `n_tiles` tiles of keys; one program for each of these.

    `scale` is the softmax scale times log2(e), above 0; `n_programs` is B times h. Row l is query ``N - L + l``.
    """
    i, part = tl.program_id(0) % n_programs, tl.program_id(0) // n_programs
    i_b, i_h = (i // n_heads).to(tl.int64), tl.load(heads + i % n_heads).to(tl.int64)
    k += i_b * stride_kb + i_h // G * stride_kh
    o_l, o_n = tl.arange(0, ROWS), tl.arange(0, BN)
    b_q = _queries(q, i_b, i_h, L, stride_qb, stride_qh, stride_qn, D, BD)
    b_l = tl.zeros([ROWS], dtype=tl.float32)
    b_m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    first = part * n_tiles
    for tile in range(first, tl.minimum(first + n_tiles, tl.cdiv(N, BN))):
        o_j = tile * BN + o_n
        b_k = _keys(k, o_j, N, stride_kn, D, BD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [ROWS, BN]
        if (tile + 1) * BN > N - L:  # some of these keys come after some of the queries
            b_s = tl.where(o_j[None, :] <= (N - L + o_l)[:, None], b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_top = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # no key yet: -inf - -inf is no number
        b_l = b_l * tl.exp2(b_m - b_top) + tl.sum(tl.exp2(b_s * scale - b_top[:, None]), 1)
        b_m = b_m_new
    b_l = tl.where(b_l == 0, 1.0, b_l)  # no key at all; a sum that is no number stays none
    b_lse = (b_m + tl.log2(b_l)) * 0.6931471805599453  # ln(2)
    tl.store(parts + (i.to(tl.int64) * n_parts + part) * ROWS + o_l, b_lse)


@triton.jit
def sums_kernel(
    q, k, heads, lse, columns, diagonals, scale, N, L, n_heads, n_programs, n_tiles,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, DIAGONALS: tl.constexpr,
):  # fmt: skip
    """`columns` and `diagonals` ``[B, h, N]`` of the weights that `lse` ``[B, h, L]`` belongs to; BN is at least ROWS.

    A program has `n_tiles` tiles of keys, and the diagonals that come to an end in them: those of BN neighbouring j - l cross
    the tile of the same numbers and the next one, so it carries a tile's share to the next, and begins one tile early.
    """
    i, part = tl.program_id(0) % n_programs, tl.program_id(0) // n_programs
    i_b, i_h = (i // n_heads).to(tl.int64), tl.load(heads + i % n_heads).to(tl.int64)
    k += i_b * stride_kb + i_h // G * stride_kh
    o_l, o_n = tl.arange(0, ROWS), tl.arange(0, BN)
    b_q = tl.trans(_queries(q, i_b, i_h, L, stride_qb, stride_qh, stride_qn, D, BD))
    # A row that is not there weighs nothing.
    b_lse = tl.load(lse + i * L + o_l, mask=o_l < L, other=float("inf")) * 1.4426950408889634  # log2(e)
    first = part * n_tiles
    columns += i.to(tl.int64) * N
    diagonals += i.to(tl.int64) * N
    o_c = o_n[:, None] + o_l[None, :]  # of key c + l and query l: the diagonal c, or (behind the tile's end) c - BN
    b_carry = tl.zeros([BN], dtype=tl.float32)
    for tile in range(first - 1 if DIAGONALS else first, tl.minimum(first + n_tiles, tl.cdiv(N, BN) + DIAGONALS)):
        o_j = tile * BN + o_n
        b_k = _keys(k, o_j, N, stride_kn, D, BD)
        b_s = tl.dot(b_k, b_q, input_precision="ieee")  # [BN, ROWS]: sums over rows stay inside of a warp
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        if ((tile + 1) * BN > N - L) | (tile < 0):
            b_p = tl.where((o_j[:, None] <= (N - L + o_l)[None, :]) & (o_j >= 0)[:, None], b_p, 0.0)
        tl.store(columns + o_j, tl.sum(b_p, 1), mask=(o_j >= first * BN) & (o_j < N))
        if DIAGONALS:
            b_p = tl.gather(b_p, o_c & (BN - 1), 0)
            o_o = N - L + BN - o_j  # offsets of the tile before, which is complete now
            b_sum = b_carry + tl.sum(tl.where(o_c < BN, 0.0, b_p), 1)
            tl.store(diagonals + o_o, b_sum, mask=(o_j >= first * BN) & (o_o >= 0) & (o_o < N))
            b_carry = tl.sum(tl.where(o_c < BN, b_p, 0.0), 1)
