"""The Triton kernel of block attention under Triton's interpreter. Run by `test_block_triton.py` in its own process.

Triton settles on the interpreter when it is first imported, for the whole process; so these are kept from other tests, and
only ``TRITON_INTERPRET=1 pytest tests/interpreted_block_attention.py`` collects them.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
import triton  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from vlmbench.kernels.block_attention import Plan, fused  # noqa: E402
from vlmbench.kernels.block_attention.fused import Tile  # noqa: E402
from vlmbench.kernels.block_attention.tiles import query_tiles  # noqa: E402

if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("the interpreter of triton 3.6 fails in numpy 2.4 and newer", allow_module_level=True)

CPU = torch.device("cpu")
PLANS = {
    "63-no-sink": Plan(0, ((0, 20), (20, 40)), 63),
    "63-sink-of-1-tail-of-1": Plan(1, ((1, 34), (34, 62)), 63),
    "63-only-a-tail": Plan(0, (), 63),
    "111-ragged": Plan(17, ((17, 50), (50, 83), (83, 97)), 111),
    "111-blocks-of-1": Plan(3, tuple((i, i + 1) for i in range(3, 9)), 111),
    "257-sink-of-many": Plan(70, ((70, 139), (139, 208), (208, 224)), 257),
    "257-tail-of-1": Plan(64, ((64, 128), (128, 256)), 257),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an output which the kernel does not write fails every comparison."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def dots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrix products the kernel asked for.

    The interpreter multiplies the bits of bfloat16 as if they were integers; here they become float32 first, exactly.
    """
    count = [0]
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != triton.language.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        count[0] += 1
        return dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    return count


def framed(length: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random ``[1, heads, length, dim]`` inside a larger buffer of NaN: beside its rows, heads and dimensions."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((1, length + 4, heads + 1, dim + 16), float("nan"), dtype=dtype)
    buffer[:, 2:-2, :heads, :dim] = torch.randn(1, length, heads, dim, generator=generator).to(dtype)
    return buffer[:, 2:-2, :heads, :dim].transpose(1, 2)


def qkv(plan: Plan, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (framed(plan.length, h, dim, dtype, seed) for seed, h in enumerate((heads, kv_heads, kv_heads)))
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, tile: Tile | None) -> None:
    """Against softmax written out in float64, within what rounding can do.

    With weights p of a row, P = Σ p |v| and u the unit roundoff of the tensors' dtype (twice that for bfloat16, to which
    the interpreter cuts off): rounding the weights before the second product moves a row by at most u P, and rounding the
    output by u P again. A score is a sum of D products in
    float32, off by at most e = (D + 4) 2⁻²⁴ |q| |k| scale (the 4: scaling, the maximum's subtraction, exp2), which
    moves weights and their sum by a factor 1 ± e each: 2 e P. Sums over n keys, rescaled once a key tile, add
    2 (n + 8) 2⁻²⁴ P. Below the dtype's normal range an error is absolute: half its least number for every weight, and for
    the output. The second order is below a tenth.
    """
    ours = fused.attended(q, k, v, plan, tile=tile)
    groups, dim, scale = q.shape[1] // k.shape[1], q.shape[-1], q.shape[-1] ** -0.5
    wide, keys, values = q.double(), *(x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = (scale * wide @ keys.transpose(-1, -2)).masked_fill(~plan.allow, float("-inf"))
    weights = scores.softmax(-1)
    info = torch.finfo(q.dtype)
    e = (dim + 4) * 2**-24 * scale * float(wide.norm(dim=-1).max() * keys.norm(dim=-1).max())
    u = info.eps if q.dtype == torch.bfloat16 else info.eps / 2
    relative = 2 * u + 2 * e + 2 * (plan.length + 8) * 2**-24
    absolute = (plan.length + 1) * info.tiny * info.eps / 2 * float(values.abs().max())
    bound = 1.1 * (relative * (weights @ values.abs()) + absolute)
    assert ((ours.out.double() - weights @ values).abs() <= bound).all()
    lse = scores.logsumexp(-1)
    # The same score error, a float32 sum's relative one, and the rounding of the result.
    assert ((ours.lse.double() - lse).abs() <= e + 2 * (plan.length + 8) * 2**-24 + lse.abs() * 2**-22).all()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("tile", [Tile(16, 16), Tile(64, 32), Tile(32, 64)], ids=lambda t: f"{t.rows}x{t.keys}")
def test_the_kernel_is_the_rule(name: str, tile: Tile) -> None:
    plan = PLANS[name]
    check(*qkv(plan, 2, 1, 16, torch.float32), plan, tile)


@pytest.mark.parametrize("dim", [8, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_head_dimensions_and_dtypes(dim: int, dtype: torch.dtype) -> None:
    plan = PLANS["63-sink-of-1-tail-of-1"]
    check(*qkv(plan, 2, 1, dim, dtype), plan, None)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 2), (3, 1)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    plan = PLANS["111-ragged"]
    check(*qkv(plan, heads, kv_heads, 16, torch.float32), plan, Tile(32, 32))


def test_heads_before_tokens_in_memory() -> None:
    plan = PLANS["111-ragged"]
    q, k, v = (x.contiguous() for x in qkv(plan, 2, 1, 16, torch.float32))
    check(q, k, v, plan, Tile(32, 32))


@pytest.mark.parametrize("name", ["63-no-sink", "111-ragged", "257-sink-of-many"])
def test_each_allowed_pair_counts_once_and_no_other(name: str) -> None:
    """With queries of zero every key weighs the same, and values that mark 128 keys at a time show who was seen."""
    plan = PLANS[name]
    n = plan.length
    seen_by = plan.allow.sum(1).float()
    q, k = torch.zeros(1, 1, n, 128), torch.randn(1, 1, n, 128)
    for begin in range(0, n, 128):
        marks = torch.eye(n)[:, begin : begin + 128]
        v = torch.nn.functional.pad(marks, (0, 128 - marks.shape[1]))[None, None]
        ours = fused.attended(q, k, v, plan, tile=Tile(64, 32))
        visits = (ours.out[0, 0] * seen_by[:, None])[:, : marks.shape[1]]
        # One division, one product, all counts below 2**24.
        torch.testing.assert_close(visits, plan.allow[:, begin : begin + 128].float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.lse[0, 0], seen_by.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("tile", [Tile(32, 16), Tile(64, 32)], ids=lambda t: f"{t.rows}x{t.keys}")
def test_no_work_is_done_for_tiles_without_a_pair(name: str, tile: Tile, dots: list[int]) -> None:
    """Two products for each key tile that holds a pair of the query tile; key tiles start at 0 and at the own keys."""
    plan = PLANS[name]
    tiles = 0
    for first, stop, own, far in query_tiles(plan, tile.rows, 3, CPU).tolist():
        seen = plan.allow[first // 3 : (min(first + tile.rows, stop) - 1) // 3 + 1].any(0)
        for begin, end in ((0, far), (own, plan.length)):
            tiles += sum(bool(seen[j : min(j + tile.keys, end)].any()) for j in range(begin, end, tile.keys))
    fused.attended(*qkv(plan, 3, 1, 16, torch.float32), plan, tile=tile)
    assert dots[0] == 2 * tiles


def test_what_cannot_be_seen_cannot_leak() -> None:
    """NaN in the keys and values of one region changes no row of a region that does not see it, not by a bit."""
    plan = PLANS["111-ragged"]
    q, k, v = qkv(plan, 2, 1, 16, torch.float32)
    before = fused.block_attention(q, k, v, plan, tile=Tile(32, 32))
    for start, stop in (*plan.blocks, (plan.tail, plan.length)):
        k_bad, v_bad = k.clone(), v.clone()
        k_bad[:, :, start:stop] = v_bad[:, :, start:stop] = float("nan")
        blind = ~plan.allow[:, start:stop].any(1)
        assert blind.any()
        after = fused.block_attention(q, k_bad, v_bad, plan, tile=Tile(32, 32))
        assert torch.equal(after[:, :, blind], before[:, :, blind])
        assert after[:, :, ~blind].isnan().all(-1).any()


@pytest.mark.parametrize("row", [0, 16, 17, 49, 60, 96, 109])
def test_what_comes_later_cannot_leak(row: int) -> None:
    """Inside a tile later keys are loaded and masked: NaN keys and values of any finite size leave earlier rows alone."""
    plan = PLANS["111-ragged"]
    q, k, v = qkv(plan, 2, 1, 16, torch.float32)
    before = fused.block_attention(q, k, v, plan, tile=Tile(32, 32))
    k, v = k.clone(), v.clone()
    k[:, :, row + 1 :], v[:, :, row + 1 :] = float("nan"), 3e38
    after = fused.block_attention(q, k, v, plan, tile=Tile(32, 32))
    assert torch.equal(after[:, :, : row + 1], before[:, :, : row + 1])


def test_large_scores_do_not_overflow() -> None:
    plan = PLANS["111-ragged"]
    q, k, v = qkv(plan, 2, 1, 16, torch.float32)
    out = fused.block_attention(q * 1e4, k * 1e4, v, plan, tile=Tile(32, 32))
    assert out.isfinite().all()
    assert out.abs().max() <= v[v.isfinite()].abs().max() * (1 + 2**-20)  # an average


@pytest.mark.parametrize("heads", [1, 3], ids=["rows-apart", "heads-apart"])
def test_offsets_pass_two_to_the_31(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows or heads so far apart, in memory that is promised and hardly touched, that 32 bits would point outside of it.

    The distance itself fits 32 bits, as it does in a prompt of a million tokens; its multiples do not, of what is read and
    of what is written.
    """
    plan, tile, dim = PLANS["63-only-a-tail"], Tile(32, 16), 16
    # Without this the interpreter ends by copying every storage onto itself, which touches all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    apart = 2**31 // 40 if heads == 1 else 2**30
    by_head, by_row = (0, apart) if heads == 1 else (apart, dim)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which the module names from Python 3.13 on
    size = 2 * apart * (plan.length if heads == 1 else heads)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    numbers = torch.frombuffer(memory, dtype=torch.float16)
    near = qkv(plan, heads, heads, dim, torch.float16)
    room = 4 * plan.length * dim  # numbers between one tensor's begin and the next one's
    q, k, v = (numbers.as_strided((1, heads, plan.length, dim), (0, by_head, by_row, 1), room * i) for i in range(3))
    for x, original in zip((q, k, v), near, strict=True):
        x.copy_(original)
    here = fused.block_attention(*near, plan, tile=tile)
    empty = torch.empty
    # The kernel's own output is no exception.
    monkeypatch.setattr(
        torch,
        "empty",
        lambda size, **options: (
            numbers.as_strided(size, (0, by_row, by_head, 1), room * 3) if len(size) == 4 else empty(size, **options)
        ),
    )
    out = fused.block_attention(q, k, v, plan, tile=tile)
    assert out.stride()[1:3] == (by_head, by_row)
    assert torch.equal(out, here)


def test_the_tuned_kernel_names_its_arguments() -> None:
    """Tuning keys on names; every configuration has a table of query tiles; and timings are kept on disk."""
    from vlmbench.kernels.block_attention import fused_kernel

    source = fused_kernel.__file__
    with open(source, encoding="utf-8") as file:
        assert "cache_results=True" in file.read()
    for config in fused_kernel.SHORT + fused_kernel.WIDE:
        assert config.kwargs["BM"] in fused_kernel.TUNED_ROWS
