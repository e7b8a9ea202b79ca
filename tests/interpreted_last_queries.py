"""The Triton kernels of the last queries under Triton's interpreter. Run by `test_last_queries.py` in its own process.

Memory is poisoned and bfloat16 is widened as in `interpreted_block_attention`, whose fixtures these are.
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.interpreted_block_attention import dots, framed, poison  # noqa: F401
from vlmbench.kernels.block_attention.fused import Tile
from vlmbench.kernels.calls import Tally, last_weights
from vlmbench.kernels.grid import find_lines, lines_of
from vlmbench.kernels.last_queries import fused, reference
from vlmbench.kernels.last_queries.reference import Sums
from vlmbench.kernels.vertical_slash import index_of, make_index


def asked(
    n: int, last: int = 64, heads: int = 2, kv_heads: int = 1, dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The last queries ``[1, H, L, D]`` and all keys, between rows of NaN."""
    return framed(n, heads, dim, dtype, 0)[:, :, -last:], framed(n, kv_heads, dim, dtype, 1)


def computed(q: Tensor, k: Tensor, heads: Tensor, **options: Any) -> tuple[Tensor, Sums]:
    lse = fused.log_sum_exp(q, k, heads, **options)
    return lse, fused.sums(q, k, heads, lse, **options)


def check(q: Tensor, k: Tensor, heads: Tensor, found: tuple[Tensor, Sums]) -> None:
    """Against float64, within what rounding in float32 can do.

    A score is a sum of D products, off by at most e = (D + 4) 2⁻²⁴ |q| |k| scale (the 4: scaling, a subtraction, exp2), and
    a log-sum-exp by that, a sum's 2 (n + 8) 2⁻²⁴ and its own rounding. A weight is the exponential of their difference, and
    a sum of at most 64 of them adds 64 · 2⁻²⁴.
    """
    (lse, (columns, diagonals)), groups, (rows, dim), n = found, q.shape[1] // k.shape[1], q.shape[2:], k.shape[2]
    scale = dim**-0.5
    wide, long = q[:, heads].double(), k.double()[:, heads // groups]
    later = torch.arange(n) > torch.arange(n - rows, n)[:, None]
    scores = (scale * wide @ long.transpose(-1, -2)).masked_fill(later, float("-inf"))
    e = (dim + 4) * 2**-24 * scale * float(wide.norm(dim=-1).max() * long.norm(dim=-1).max())
    true = scores.logsumexp(-1)
    error = e + 2 * (n + 8) * 2**-24 + float(true.abs().max()) * 2**-22
    assert ((lse.double() - true).abs() <= error).all()
    want = reference.sums(scores.softmax(-1))
    for ours, theirs in ((columns, want.columns), (diagonals, want.diagonals)):
        bound = 1.1 * (e + error + 64 * 2**-24) * theirs + 64 * torch.finfo(torch.float32).tiny
        assert ((ours.double() - theirs).abs() <= bound).all()
        torch.testing.assert_close(ours.sum(-1), torch.full(ours.shape[:2], float(rows)), rtol=2 * error, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "last"), [(1, 1), (7, 7), (63, 63), (64, 64), (65, 64), (129, 64), (300, 64), (300, 5), (600, 64)]
)
def test_sums_are_those_of_the_weights_whatever_the_length(n: int, last: int) -> None:
    q, k = asked(n, last)
    heads = torch.arange(2)
    check(q, k, heads, computed(q, k, heads))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("keys", [64, 128])
def test_where_the_keys_are_cut_makes_no_difference(keys: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every diagonal crosses two tiles, and at a cut two programs."""
    monkeypatch.setattr(fused, "LEAST", least)
    q, k = asked(577)
    heads = torch.arange(2)
    check(q, k, heads, computed(q, k, heads, tile=Tile(64, keys)))


@pytest.mark.parametrize("dim", [8, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_head_dimensions_and_dtypes(dim: int, dtype: torch.dtype) -> None:
    """Products of two 16-bit numbers are exact in float32, as on a GPU: the bound is float32's."""
    q, k = asked(101, dim=dim, dtype=dtype)
    heads = torch.arange(2)
    check(q, k, heads, computed(q, k, heads))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
def test_heads_share_keys_and_those_that_are_named_are_computed(heads: int, kv_heads: int) -> None:
    q, k = asked(101, heads=heads, kv_heads=kv_heads)
    some = torch.tensor([heads - 1, 0, 2])
    check(q, k, some, computed(q, k, some))


def test_prompts_of_a_batch_have_their_own_sums_and_heads_may_lie_before_tokens() -> None:
    q, k = (torch.cat([x, x.flip(2)]).contiguous() for x in asked(101, heads=4, kv_heads=2))
    check(q, k, torch.tensor([3, 1]), computed(q, k, torch.tensor([3, 1])))


def test_columns_alone_are_the_same_columns() -> None:
    q, k = asked(200)
    heads = torch.arange(2)
    lse, both = computed(q, k, heads)
    alone = fused.sums(q, k, heads, lse, diagonals=False)
    assert torch.equal(alone.columns, both.columns)
    assert alone.diagonals.shape == (1, 2, 0)


def test_nothing_depends_on_which_program_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card their order differs from run to run; the index must not."""
    monkeypatch.setattr(fused, "LEAST", 1)
    q, k = asked(300)
    heads = torch.arange(2)
    lse, here = computed(q, k, heads)
    turned = interpreter.InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: turned(self, self.grid_dim[0] - 1 - x, y, z),
    )
    again, there = computed(q, k, heads)
    for a, b in zip((lse, *here), (again, *there), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("planted", [False, True])
def test_the_index_and_the_lines_are_those_of_the_plain_path(planted: bool) -> None:
    n = 500
    q, k = (x.clone() for x in asked(n, heads=4, kv_heads=2))
    if planted:  # two heads with a place in every 28 tokens, and two with clusters of columns
        q[:, :2, :, 0] = q[:, 2:, :, 1] = 8.0
        k[..., 0] = 4.0 * (torch.arange(n) % 28 == 9)
        k[..., 1] = 2.0 * (torch.arange(n) // 20 % 5 == 2)
    heads = torch.arange(4)
    weights = last_weights(q, k, scale=0.25, tally=Tally())
    _, found = computed(q, k, heads)
    sizes = {"columns": 30, "slashes": 25, "first": 2, "near": 3, "block": 16}
    theirs, ours = make_index(weights, **sizes), index_of(found, **sizes)
    assert torch.equal(ours.columns, theirs.columns)
    assert torch.equal(ours.diagonals, theirs.diagonals)
    lines = find_lines(weights, (7, 14, 28, 56), start=10, stop=470)
    mine = lines_of(found.columns[..., 10:470] / 64, (7, 14, 28, 56))
    assert torch.equal(mine.stride, lines.stride)
    assert torch.equal(mine.phase, lines.phase)
    if planted:
        assert mine.stride[:, :2].tolist() == [[28] * 2]
        assert mine.phase[:, :2].tolist() == [[(9 - 10) % 28] * 2]


def test_what_comes_later_cannot_leak() -> None:
    """Inside a tile later keys are loaded and masked: a NaN key leaves earlier queries alone, and is not hidden from others."""
    q, k = asked(101)
    heads = torch.arange(2)
    before = fused.log_sum_exp(q, k, heads)
    k = k.clone()
    k[:, :, 91:] = float("nan")
    after = fused.log_sum_exp(q, k, heads)
    assert torch.equal(after[..., :54], before[..., :54])
    assert bool(after[..., 54:].isnan().all())
    found = fused.sums(q[:, :, :54], k[:, :, :91], heads, after[..., :54].contiguous())
    assert found.columns.isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow")  # of keys that are masked
def test_large_scores_of_either_sign_are_no_nan() -> None:
    q, k = asked(101)
    heads = torch.arange(2)
    for q_, k_ in ((q * 1e2, k * 1e2), (q * 0 - 100, k * 0 + 100), (q * 0, k)):
        lse, found = computed(q_, k_, heads)
        assert lse.isfinite().all()
        for each in found:
            assert each.isfinite().all()
            # A log-sum-exp of 1e5 is a multiple of 2**-7, and a weight may come out as so much more.
            assert each.max() <= 64 * 1.1


def test_offsets_pass_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2**31 / 40 numbers apart, in memory that is promised and hardly touched: 32 bits would point outside of it."""
    n, apart, dim = 63, 2**31 // 40, 16
    # Without this the interpreter ends by copying every storage onto itself, which touches all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which the module names from Python 3.13 on
    memory = mmap.mmap(-1, 2 * n * apart, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    numbers = torch.frombuffer(memory, dtype=torch.float16)
    near = asked(n, n, 1, 1, dim, torch.float16)
    q, k = (numbers.as_strided((1, 1, n, dim), (0, 0, apart, 1), 256 * i) for i in range(2))
    for x, original in zip((q, k), near, strict=True):
        x.copy_(original)
    heads = torch.arange(1)
    here, there = computed(*near, heads), computed(q, k, heads)
    assert torch.equal(here[0], there[0])
    assert torch.equal(here[1].diagonals, there[1].diagonals)
