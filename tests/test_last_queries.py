"""Sums of the last queries' attention: what is refused, what they mean, and true shapes on CUDA.

The kernels themselves are run by `interpreted_last_queries.py` under Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.on_triton import qkv, run_interpreted, run_without_triton
from vlmbench.kernels.calls import Tally, last_weights
from vlmbench.kernels.last_queries import fused, reference
from vlmbench.kernels.sparse_lines import Refused
from vlmbench.kernels.vertical_slash import index_of


def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted("interpreted_last_queries.py")


def test_importing_needs_no_triton() -> None:
    run_without_triton("from vlmbench.kernels import last_queries")


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (9, 4), (40, 40)])
def test_sums_are_over_keys_and_offsets_pair_by_pair(n: int, rows: int) -> None:
    q, k, _ = qkv(n)
    weights = last_weights(q, k, scale=0.25, tally=Tally(), last=rows)
    columns, diagonals = torch.zeros(1, 2, n), torch.zeros(1, 2, n)
    for row in range(rows):
        i = n - rows + row
        for j in range(i + 1):
            columns[..., j] += weights[:, :, row, j]
            diagonals[..., i - j] += weights[:, :, row, j]
    found = reference.sums(weights)
    # float32 sums of at most 40 shares, in another order.
    torch.testing.assert_close(found.columns, columns, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.diagonals, diagonals, rtol=0, atol=1e-5)


def test_an_index_leaves_the_sums_it_is_made_of_alone() -> None:
    q, k, _ = qkv(50)
    found = reference.sums(last_weights(q, k, scale=0.25, tally=Tally()))
    before = [x.clone() for x in found]
    index_of(found, columns=5, slashes=5)
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


def test_refusals_are_sentences_with_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = qkv(70)
    last, heads = q[:, :, -64:], torch.arange(2)
    lse = torch.zeros(1, 2, 64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = r"last queries cannot run: (it needs a GPU|triton is not installed)"
    with pytest.raises(Refused, match=words):
        fused.log_sum_exp(last, k, heads)
    with pytest.raises(Refused, match=words):
        fused.sums(last, k, heads, lse)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # past the question of the device; nothing is launched here
    with pytest.raises(Refused, match="float64, float64, float64"):
        fused.log_sum_exp(last.double(), k.double(), heads)
    with pytest.raises(Refused, match=r"scale of -1\.0"):
        fused.log_sum_exp(last, k, heads, scale=-1.0)
    with pytest.raises(Refused, match="256, 256, 256"):
        fused.log_sum_exp(last.repeat(1, 1, 1, 16), k.repeat(1, 1, 1, 16), heads)
    for wrong in (q, q[:, :, :0], q[:, :1].expand(-1, 3, -1, -1)[:, :, -64:]):
        with pytest.raises(ValueError, match=r"at most 64\) of one prompt with heads that divide"):
            fused.log_sum_exp(wrong, k, heads)
    with pytest.raises(ValueError, match=r"lse \[1, 2, 64\] is not of 1 heads"):
        fused.sums(last, k, heads[:1], lse)


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (16_384, 28), (65_537, 17), (2**20, 28), (2**20 + 1, 1)])
def test_programs_have_all_tiles_between_them_and_are_neither_few_nor_tiny(tokens: int, heads: int) -> None:
    k = torch.empty(1, 1, tokens, 16, device="meta")
    q = torch.empty(1, heads, min(tokens, 64), 16, device="meta")
    length = fused._length(q, k, torch.arange(heads), fused.Tile(64, 64))
    tiles = -(-tokens // 64)
    assert length >= fused.LEAST
    programs = heads * -(-tiles // length)
    assert programs >= min(fused.PROGRAMS, heads * tiles // fused.LEAST)
    assert programs <= 2 * fused.PROGRAMS


# On a GPU. The shape is gpu-mm of the fixed workloads, and one of a million tokens for addresses.


def check(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Against float64, head by head, within `interpreted_last_queries.check`'s bound, twice for tensor cores."""
    from vlmbench.kernels.last_queries.reference import sums

    q, k, _ = qkv(tokens, heads, kv_heads, dim, dtype, "cuda")
    last, which = q[:, :, -64:], torch.arange(heads, device="cuda")
    lse = fused.log_sum_exp(last, k, which)
    found = fused.sums(last, k, which, lse)
    again = fused.sums(last, k, which, fused.log_sum_exp(last, k, which))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))  # the same in every run
    for head in range(heads):
        wide, long = last[:, head : head + 1].double(), k[:, head * kv_heads // heads, None].double()
        scores = dim**-0.5 * wide @ long.transpose(-1, -2)
        rows = torch.arange(tokens - 64, tokens, device="cuda")[:, None]
        scores = scores.masked_fill(torch.arange(tokens, device="cuda") > rows, float("-inf"))
        e = 2 * (dim + 4) * 2**-24 * dim**-0.5 * float(wide.norm(dim=-1).max() * long.norm(dim=-1).max())
        true = scores.logsumexp(-1)
        error = e + 4 * (tokens + 8) * 2**-24 + float(true.abs().max()) * 2**-22
        assert ((lse[:, head : head + 1].double() - true).abs() <= error).all()
        for ours, theirs in zip(found, sums(scores.softmax(-1)), strict=True):
            bound = 1.1 * (e + error + 128 * 2**-24) * theirs + 64 * torch.finfo(torch.float32).tiny
            assert ((ours[:, head : head + 1].double() - theirs).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "dim", "dtype"),
    [(16_384, 128, torch.bfloat16), (3001, 80, torch.bfloat16), (3001, 64, torch.float16), (3001, 128, torch.float32)],
    ids=str,
)
def test_true_shapes_on_cuda(tokens: int, dim: int, dtype: Any) -> None:
    check(tokens, 28, 4, dim, dtype)


@pytest.mark.gpu
def test_a_million_tokens_are_addressed_on_cuda() -> None:
    """Two query heads and a key head in room for 28: offsets pass 2**31."""
    n, dim = 2**20, 128
    room = torch.empty(1, n, 28, dim, dtype=torch.bfloat16, device="cuda")  # 3.8 G numbers
    q, k = room[:, -64:, :2].transpose(1, 2), room[:, :, 27:].transpose(1, 2)
    for x in (q, k):
        x.copy_(torch.randn(x.shape, dtype=torch.bfloat16, device="cuda"))
    which = torch.arange(2, device="cuda")
    lse = fused.log_sum_exp(q, k, which)
    found = fused.sums(q, k, which, lse)
    theirs = reference.sums(last_weights(q, k, scale=dim**-0.5, tally=Tally()))
    # Shares near 64 / n; keys that are read at a wrong address would move them by their own size.
    for ours, want in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-2, atol=1e-7)
