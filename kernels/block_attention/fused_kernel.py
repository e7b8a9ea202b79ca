"""The Triton kernel of block attention: one launch, one program for each query tile and key head. See the README beside it.

Imported only by `fused`, when the kernel is first used: this module needs triton.
"""

# mypy: allow-untyped-defs
# (the parameters of a kernel are pointers and numbers that triton types itself)

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

__all__ = ["TUNED_ROWS", "OutOfResources", "block_attention_fwd", "block_attention_fwd_kernel"]

TUNED_ROWS = (64, 128)
"""Values of BM that the configurations use; a table of query tiles is passed for each."""

SHORT = [  # bf16 and fp16. What does not fit a card drops out of the tuning: the first takes 160 KB at D = 128, the last 64
    triton.Config({"BM": bm, "BN": bn}, num_warps=warps, num_stages=stages)
    for bm, bn, warps, stages in (
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 32, 8, 4),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 3),
    )
]
WIDE = [  # fp32
    triton.Config({"BM": 64, "BN": bn}, num_warps=warps, num_stages=2) for bn, warps in ((32, 16), (16, 8), (16, 4))
]


def _of_this_dtype(configs, named, **kwargs):
    return WIDE if named["q"].element_size() == 4 else SHORT


@triton.jit
def _step(
    b_q, b_o, b_l, b_m, k, v, start, end, o_m, o_k, o_v, stride_kn, stride_vn, scale, D: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Join the keys ``[start, start + BN)`` to the running softmax; with MASKED only those below `end` and the diagonal."""
    o_n = start + tl.arange(0, BN)
    m_d = tl.arange(0, BD) < D
    p_k = k + start.to(tl.int64) * stride_kn + o_k
    p_v = v + start.to(tl.int64) * stride_vn + o_v
    if MASKED:
        m_n = (o_n < end)[:, None] & m_d[None, :]
        b_k = tl.load(p_k, mask=m_n, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v, mask=m_n, other=0.0)
    elif D < BD:
        b_k = tl.load(p_k, mask=m_d[None, :], other=0.0)
        b_v = tl.load(p_v, mask=m_d[None, :], other=0.0)
    else:
        b_k = tl.load(p_k)
        b_v = tl.load(p_v)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
    if MASKED:
        b_s = tl.where((o_n < end)[None, :] & (o_n[None, :] <= o_m[:, None]), b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_m_new[:, None])
    b_decay = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision="ieee")
    return b_o, b_l, b_m_new


@triton.jit
def block_attention_fwd_kernel(
    q, k, v, o, lse, tiles_64, tiles_128, scale, N,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_oh, stride_on,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, LARGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`scale` is the softmax scale times log2(e), above 0. LARGE is there for the tuning key alone.

    Row r of a table of query tiles is head ``r % G`` of its group at token ``r // G``.
    """
    i_t, i_h = tl.program_id(0) // HKV, (tl.program_id(0) % HKV).to(tl.int64)
    tile = (tiles_64 if BM == 64 else tiles_128) + 4 * i_t
    row, stop, own, far = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    o_r = row + tl.arange(0, BM)
    o_m = o_r // G
    first = row // G
    last = (tl.minimum(row + BM, stop) - 1) // G + 1

    # Offsets count elements and pass 2**31 in prompts of a million tokens.
    k += i_h * stride_kh
    v += i_h * stride_vh
    o_h = i_h * G + o_r % G
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN).to(tl.int64)
    o_k = o_n[:, None] * stride_kn + o_d[None, :]
    o_v = o_n[:, None] * stride_vn + o_d[None, :]
    m_r = o_r < stop
    m_q = m_r[:, None] & (o_d < D)[None, :]

    p_q = q + (o_h * stride_qh + o_m.to(tl.int64) * stride_qn)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM, BD]
    b_o = tl.zeros([BM, BD], dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    b_m = tl.full([BM], float("-inf"), dtype=tl.float32)

    # Key tiles that every row of this tile sees whole: of the far keys, then of its own up to the first row.
    n_far = far // BN
    n_own = (first - own + 1) // BN
    for i in range(n_far + n_own):
        start = tl.where(i < n_far, i * BN, own + (i - n_far) * BN)
        b_o, b_l, b_m = _step(
            b_q, b_o, b_l, b_m, k, v, start, last, o_m, o_k, o_v, stride_kn, stride_vn, scale, D, BN, BD, False
        )  # fmt: skip
    # What is left of the far keys, then the tiles on the diagonal. A row's first tile always holds a key that it sees,
    # so its maximum is finite from there on.
    n_rest = (far - n_far * BN > 0).to(tl.int32)
    below = own + n_own * BN
    for i in range(n_rest + tl.cdiv(last - below, BN)):
        start = tl.where(i < n_rest, n_far * BN, below + (i - n_rest) * BN)
        end = tl.where(i < n_rest, far, last)
        b_o, b_l, b_m = _step(
            b_q, b_o, b_l, b_m, k, v, start, end, o_m, o_k, o_v, stride_kn, stride_vn, scale, D, BN, BD, True
        )  # fmt: skip

    p_o = o + (o_h * stride_oh + o_m.to(tl.int64) * stride_on)[:, None] + o_d[None, :]
    tl.store(p_o, (b_o / b_l[:, None]).to(o.dtype.element_ty), mask=m_q)
    tl.store(lse + o_h * N + o_m, (b_m + tl.log2(b_l)) * 0.6931471805599453, mask=m_r)  # ln(2)


# Triton keeps the timings with its compiled kernels (TRITON_CACHE_DIR, ~/.triton/cache by default), under a key of its own
# version, this source, the card's architecture, and the dtypes and arguments named here.
block_attention_fwd = triton.autotune(
    SHORT + WIDE, key=["D", "LARGE"], prune_configs_by={"early_config_prune": _of_this_dtype}, cache_results=True
)(block_attention_fwd_kernel)
