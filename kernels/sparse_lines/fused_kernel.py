"""The Triton kernels of sparse lines: a program walks runs of keys, each an arithmetic progression. See the README beside it.

Imported only by `fused`, when a kernel is first used: this module needs triton.
"""

# mypy: allow-untyped-defs
# (the parameters of a kernel are pointers and numbers that triton types itself)

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

__all__ = ["SHORT", "TUNED_ROWS", "WIDE", "OutOfResources", "lines_fwd", "lines_fwd_kernel", "slash_fwd_kernel"]

TUNED_ROWS = (64, 128)
"""Values of BM that the configurations use; an order of tiles is passed for each."""

SHORT = [  # bf16 and fp16
    triton.Config({"BM": bm, "BN": bn}, num_warps=warps, num_stages=stages)
    for bm, bn, warps, stages in (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 32, 8, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 3),
    )
]
WIDE = [  # fp32
    triton.Config({"BM": 64, "BN": bn}, num_warps=warps, num_stages=2) for bn, warps in ((32, 16), (16, 8), (16, 4))
]


def _of_this_call(configs, named, **kwargs):
    """Blocks of an index are 64 rows of a tile."""
    if named["q"].element_size() == 4:
        return WIDE
    return [config for config in SHORT if config.kwargs["BM"] == 64 or not kwargs["VS"]]


@triton.jit
def _step(
    b_q, b_o, b_l, b_m, k, v, o_j, m_n, m_s, stride_kn, stride_vn, scale, D: tl.constexpr, BD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Join the keys at ``o_j [BN]`` to the running softmax; with MASKED pairs of `m_s` alone, and keys of `m_n`."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_j = o_j.to(tl.int64)  # offsets count elements and pass 2**31 in prompts of a million tokens
    p_k = k + (o_j * stride_kn)[:, None] + o_d[None, :]
    p_v = v + (o_j * stride_vn)[:, None] + o_d[None, :]
    if MASKED:
        m_k = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k, mask=m_k, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v, mask=m_k, other=0.0)
    elif D < BD:
        b_k = tl.load(p_k, mask=m_d[None, :], other=0.0)
        b_v = tl.load(p_v, mask=m_d[None, :], other=0.0)
    else:
        b_k = tl.load(p_k)
        b_v = tl.load(p_v)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_top = b_m_new
    if MASKED:  # a row may have seen no key yet: -inf - -inf is no number
        b_top = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s * scale - b_top[:, None])
    b_decay = tl.exp2(b_m - b_top)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision="ieee")
    return b_o, b_l, b_m_new


@triton.jit
def _store(o, lse, b_o, b_l, b_m, offset, offset_lse, o_q, stride_on, m_r, m_q, BD: tl.constexpr):
    """A row that saw no key is zeros with a log-sum-exp of -inf; one that saw what is no number is no number."""
    seen = b_l != 0
    b_l = tl.where(seen, b_l, 1.0)
    p_o = o + offset + (o_q * stride_on)[:, None] + tl.arange(0, BD)[None, :]
    tl.store(p_o, (b_o / b_l[:, None]).to(o.dtype.element_ty), mask=m_q)
    b_lse = tl.where(seen, (b_m + tl.log2(b_l)) * 0.6931471805599453, float("-inf"))  # ln(2)
    tl.store(lse + offset_lse + o_q, b_lse, mask=m_r)


@triton.jit
def lines_fwd_kernel(
    q, k, v, o, lse, heads, order_64, order_128, diagonals, n_diagonals, bits, columns, n_columns,
    scale, shift, end, n_heads, kinds, n_tiles, n_listed, n_bits, n_kept,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, VS: tl.constexpr, BLOCK: tl.constexpr,
    LARGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program for each tile of rows and head. LARGE and `kinds` are there for the tuning key alone.

    Row r stands at ``shift + r`` among the keys, and rows end before position `end`. `heads` has 12 numbers for each prompt
    and head (`table.FIELDS`). With VS a tile is the 64 rows of a row block, the tables from `diagonals` on are the index, and
    BLOCK is its block; `n_tiles`, `n_listed`, `n_bits` and `n_kept` are the tables' widths.
    """
    FAR: tl.constexpr = 1 << 30
    i_bh = tl.program_id(0) % n_heads
    code = tl.load((order_64 if BM == 64 else order_128) + tl.program_id(0) // n_heads)
    field = heads + i_bh * 12
    sink, local, whole = tl.load(field), tl.load(field + 1), tl.load(field + 2)
    start, stop, stride = tl.load(field + 3), tl.load(field + 4), tl.load(field + 5)
    first, flags, i_v = start + tl.load(field + 6), tl.load(field + 7), tl.load(field + 8)

    # Where its rows are: before `whole`, from there on, or (a code below zero) on horizontal lines.
    n_before = tl.cdiv(whole - shift, BM)
    on_lines, behind = code < 0, code >= n_before
    n_horizontal = tl.where((flags & 1) != 0, tl.cdiv(tl.maximum(stop - first, 0), stride), 0)
    u0 = tl.where(on_lines, tl.minimum((-1 - code) * BM, n_horizontal), 0)  # another head may have more of them
    u1 = tl.minimum(u0 + BM, n_horizontal)
    r0 = tl.where(behind, whole + (code - n_before) * BM, shift + code * BM)
    r1 = tl.minimum(r0 + BM, tl.where(behind, end, whole))
    r0 = tl.where(on_lines, first + u0 * stride, r0)
    r1 = tl.where(on_lines, first + (u1 - 1) * stride + 1, r1)
    if r0 >= r1:
        return
    o_m = r0 + tl.arange(0, BM) * tl.where(on_lines, stride, 1)
    m_r = o_m < r1
    full = on_lines | behind  # such rows see every key before them
    sink, local, stop = tl.where(full, 0, sink), tl.where(full, FAR, local), tl.where(full, 0, stop)

    # Offsets count elements and pass 2**31 in prompts of a million tokens.
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    k += i_b * stride_kb + i_h // G * stride_kh
    v += i_b * stride_vb + i_h // G * stride_vh
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    o_q = (o_m - shift).to(tl.int64)
    m_q = m_r[:, None] & (o_d < D)[None, :]
    b_q = tl.load(
        q + i_b * stride_qb + i_h * stride_qh + (o_q * stride_qn)[:, None] + o_d[None, :], mask=m_q, other=0.0
    )
    b_o = tl.zeros([BM, BD], dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    b_m = tl.full([BM], float("-inf"), dtype=tl.float32)

    # Each part of the keys begins with tiles that every row sees whole, or ends with them; the rest is masked.
    sink_end = tl.minimum(sink, r1)
    n_sink = tl.minimum(sink_end, r0 + 1) // BN
    n_sink_rest = tl.cdiv(sink_end - n_sink * BN, BN)
    # The window: tiles that its far end cuts, whole ones, and those on the diagonal.
    far = tl.where(local > 0, tl.maximum(sink_end, r0 - local + 1), r1)
    n_far = tl.cdiv(tl.maximum(tl.minimum(r1 - local, r1) - far, 0), BN)
    inner = far + n_far * BN
    n_inner = tl.maximum(r0 + 1 - inner, 0) // BN
    near = inner + n_inner * BN
    n_near = tl.cdiv(tl.maximum(r1 - near, 0), BN)
    # Vertical lines that are behind the window of every row, then of some.
    n_seen = tl.where((flags & 2) != 0, tl.maximum(tl.minimum(r1, stop) - 1 - local - first + stride, 0) // stride, 0)
    n_lines = tl.minimum(tl.maximum(r0 - local - first + stride, 0) // stride, n_seen) // BN
    n_lines_rest = tl.cdiv(n_seen - n_lines * BN, BN)
    # Block diagonals: the main one, then (masked inside when the index is finer than tiles) those behind it.
    per: tl.constexpr = 64 // BN
    row_block, n_main, n_blocks, n_single = r0 // 64, 0, 0, 0
    if VS:
        counts = i_v * n_tiles + code
        listed = tl.load(n_diagonals + counts, mask=i_v >= 0, other=0)
        n_single = tl.load(n_columns + counts, mask=i_v >= 0, other=0)
        n_main = tl.where(listed > 0, tl.cdiv(r1 - r0, BN), 0)
        n_blocks = tl.maximum(listed - 1, 0) * per
        diagonals += i_v.to(tl.int64) * n_listed + 1
        bits += i_v.to(tl.int64) * n_bits
        columns += i_v.to(tl.int64) * n_kept

    n_whole = n_sink + n_inner + n_lines
    for i in range(n_whole + (n_blocks if VS and BLOCK == 64 else 0)):
        begin = tl.where(i < n_sink, i * BN, inner + (i - n_sink) * BN)
        begin = tl.where(i < n_sink + n_inner, begin, first + (i - n_sink - n_inner) * BN * stride)
        step = tl.where(i < n_sink + n_inner, 1, stride)
        if VS and BLOCK == 64:
            j = i - n_whole
            apart = tl.load(diagonals + j // per, mask=j >= 0, other=0)
            begin = tl.where(j >= 0, (row_block - apart) * 64 + j % per * BN, begin)
            step = tl.where(j >= 0, 1, step)
        b_o, b_l, b_m = _step(
            b_q, b_o, b_l, b_m, k, v, begin + o_n * step, None, None, stride_kn, stride_vn, scale, D, BD, False
        )  # fmt: skip
    n_window = n_sink_rest + n_far + n_near
    n_rest = n_window + n_lines_rest + n_main
    for i in range(n_rest + (n_blocks if VS and BLOCK < 64 else 0)):
        begin, stops = tl.where(i < n_sink_rest, (n_sink + i) * BN, far + (i - n_sink_rest) * BN), r1
        begin = tl.where(i < n_sink_rest + n_far, begin, near + (i - n_sink_rest - n_far) * BN)
        stops = tl.where(i < n_sink_rest, sink_end, tl.minimum(tl.where(i < n_sink_rest + n_far, inner, r1), r1))
        reach = tl.where(i < n_sink_rest, FAR, local)
        # Lines begin behind the window; block diagonals are apart from everything else.
        is_line, is_block = (i >= n_window) & (i < n_window + n_lines_rest), i >= n_window + n_lines_rest
        step = tl.where(is_line, stride, 1)
        begin = tl.where(is_line, first + (n_lines + i - n_window) * BN * stride, begin)
        least = tl.where(is_line, local, 0)
        reach = tl.where(is_line | is_block, FAR, reach)
        stops = tl.where(is_line | is_block, r1, stops)
        if VS:
            begin = tl.where(is_block, row_block * 64 + (i - n_window - n_lines_rest) * BN, begin)
            if BLOCK < 64:
                j = i - n_rest
                apart = tl.load(diagonals + j // per, mask=j >= 0, other=0)
                begin = tl.where(j >= 0, (row_block - apart) * 64 + j % per * BN, begin)
        o_j = begin + o_n * step
        m_n = o_j < stops
        behind_by = o_m[:, None] - o_j[None, :]
        m_s = m_n[None, :] & (behind_by >= least) & (behind_by < reach)
        if VS and BLOCK < 64:
            apart = (o_m // BLOCK)[:, None] - (o_j // BLOCK)[None, :]
            inside = tl.where(is_block, 0, FAR)  # only pairs of block diagonals are asked about
            kept = tl.load(bits + apart, mask=m_s & (behind_by >= inside) & m_r[:, None], other=0)
            m_s = m_s & ((kept != 0) | (behind_by < inside))
        b_o, b_l, b_m = _step(b_q, b_o, b_l, b_m, k, v, o_j, m_n, m_s, stride_kn, stride_vn, scale, D, BD, True)
    if VS:  # single columns, where no block diagonal holds them
        for i in range(tl.cdiv(n_single, BN)):
            o_j = tl.load(columns + i * BN + o_n, mask=i * BN + o_n < n_single, other=-1)
            m_n = (o_j >= 0) & (o_j < r1)
            m_s = m_n[None, :] & (o_j[None, :] <= o_m[:, None])
            if BLOCK == 64:
                apart = row_block - o_j // 64
                kept = tl.load(bits + apart, mask=m_n & (apart >= 0), other=0)
                m_n = m_n & (kept == 0)
                m_s = m_s & m_n[None, :]
            else:
                apart = (o_m // BLOCK)[:, None] - (o_j // BLOCK)[None, :]
                kept = tl.load(bits + apart, mask=m_s & m_r[:, None], other=0)
                m_s = m_s & (kept == 0)
            b_o, b_l, b_m = _step(b_q, b_o, b_l, b_m, k, v, o_j, m_n, m_s, stride_kn, stride_vn, scale, D, BD, True)

    own_line = (o_m >= first) & (o_m < stop) & ((o_m - first) % stride == 0) & ((flags & 1) != 0)
    m_r = m_r & (own_line == 0)  # such rows have a program of their own
    m_q = m_r[:, None] & (o_d < D)[None, :]
    _store(
        o,
        lse,
        b_o,
        b_l,
        b_m,
        i_b * stride_ob + i_h * stride_oh,
        i_bh.to(tl.int64) * (end - shift),
        o_q,
        stride_on,
        m_r,
        m_q,
        BD,
    )


@triton.jit
def slash_fwd_kernel(
    q, k, v, o, lse, heads, scale, shift, end, n_heads,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax that `o` and `lse` hold: each row's own residue, which is one progression of keys.

    One program for each tile of a residue's rows and head; there are as many as the head that has most of them needs.
    """
    i_bh, tile = tl.program_id(0) % n_heads, tl.program_id(0) // n_heads
    field = heads + i_bh * 12
    local, start, stop = tl.load(field + 1), tl.load(field + 3), tl.load(field + 4)
    stride, phase, flags = tl.load(field + 5), tl.load(field + 6), tl.load(field + 7)
    tiles = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), stride), BM)  # of a residue
    residue, u0 = tile % stride, (tiles - 1 - tile // stride) * BM  # longest first
    n_rows = tl.cdiv(stop - start - residue, stride)
    skip = tl.cdiv(local, stride)
    seen = tl.minimum(u0 + BM, n_rows) - skip  # keys of the last row
    # A residue that is a line sees it as a vertical one, or is a horizontal one and sees everything.
    is_line = (residue == phase) & ((flags & 3) != 0)
    begin = start + residue
    last = begin + (tl.minimum(u0 + BM, n_rows) - 1) * stride
    if (u0 < 0) | (seen <= 0) | is_line | ((flags & 4) == 0) | (last < shift):
        return
    o_u = u0 + tl.arange(0, BM)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    k += i_b * stride_kb + i_h // G * stride_kh
    v += i_b * stride_vb + i_h // G * stride_vh
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    o_q = (begin + o_u * stride - shift).to(tl.int64)
    m_r = (o_u < n_rows) & (o_q >= 0)
    m_q = m_r[:, None] & (o_d < D)[None, :]
    offset, offset_lse = i_b * stride_ob + i_h * stride_oh, i_bh.to(tl.int64) * (end - shift)
    b_q = tl.load(
        q + i_b * stride_qb + i_h * stride_qh + (o_q * stride_qn)[:, None] + o_d[None, :], mask=m_q, other=0.0
    )
    b_o = tl.load(o + offset + (o_q * stride_on)[:, None] + o_d[None, :], mask=m_q, other=0.0).to(tl.float32)
    b_m = tl.load(lse + offset_lse + o_q, mask=m_r, other=0.0) * 1.4426950408889634  # log2(e)
    b_l = tl.full([BM], 1.0, dtype=tl.float32)
    n_whole = tl.maximum(u0 + 1 - skip, 0) // BN
    for i in range(n_whole):
        o_j = begin + (i * BN + o_n) * stride
        b_o, b_l, b_m = _step(b_q, b_o, b_l, b_m, k, v, o_j, None, None, stride_kn, stride_vn, scale, D, BD, False)
    for i in range(n_whole, tl.cdiv(seen, BN)):
        o_t = i * BN + o_n
        m_n = o_t < seen
        m_s = m_n[None, :] & (o_t[None, :] + skip <= o_u[:, None])
        o_j = begin + o_t * stride
        b_o, b_l, b_m = _step(b_q, b_o, b_l, b_m, k, v, o_j, m_n, m_s, stride_kn, stride_vn, scale, D, BD, True)
    _store(o, lse, b_o, b_l, b_m, offset, offset_lse, o_q, stride_on, m_r, m_q, BD)


# Triton keeps the timings with its compiled kernels (TRITON_CACHE_DIR, ~/.triton/cache by default), under a key of its own
# version, this source, the card's architecture, and the dtypes and arguments named here.
lines_fwd = triton.autotune(
    SHORT + WIDE,
    key=["D", "LARGE", "VS", "BLOCK", "kinds"],
    prune_configs_by={"early_config_prune": _of_this_call},
    cache_results=True,
)(lines_fwd_kernel)
