"""Sparse patterns against their masks: every allowed pair once, nothing else, for any shape; and the online indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmbench.kernels.a_shape import a_shape
from vlmbench.kernels.a_shape import seen as a_shape_seen
from vlmbench.kernels.a_shape import visible as a_shape_visible
from vlmbench.kernels.calls import Tally, attend, last_weights, reference, take
from vlmbench.kernels.calls.tiles import softmaxed
from vlmbench.kernels.grid import Grid, find_lines, grid_attention
from vlmbench.kernels.grid import seen as grid_seen
from vlmbench.kernels.grid import visible as grid_visible
from vlmbench.kernels.vertical_slash import Index, diagonal_sums, lists, make_index, vertical_slash

few = settings(max_examples=60)
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
"""float32 rounding of averages over some hundred values near one."""


def qkv(n: int, heads: int = 2, dim: int = 16, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """As a model hands them over: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(batch, n, heads, dim, generator=generator).transpose(1, 2) for _ in range(3))
    return q, k, v


def every(n: int) -> Tensor:
    return torch.arange(n)


# A-shape and Tri-shape.


@few
@given(
    st.integers(1, 300),
    st.integers(0, 50),
    st.integers(1, 200),
    st.integers(0, 60),
    st.sampled_from([(1, 16), (2, 80)]),
)
def test_a_shape_is_its_mask_and_counts_each_pair_once(n: int, sink: int, local: int, tail: int, more: Any) -> None:
    batch, dim = more
    q, k, v = qkv(n, dim=dim, batch=batch)
    allowed = a_shape_visible(every(n), n, sink=sink, local=local, tail=tail)
    tally = Tally()
    out, lse = a_shape(q, k, v, sink=sink, local=local, tail=tail, tally=tally)
    torch.testing.assert_close(out, reference(q, k, v, allowed), **TOLERANCE)
    scores = (q @ k.transpose(-1, -2) * dim**-0.5).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1), **TOLERANCE)
    assert tally.pairs == int(allowed.sum()) * 2 * batch
    assert torch.equal(a_shape_seen(every(n), n, sink=sink, local=local, tail=tail), allowed.sum(-1))


def test_a_window_as_long_as_the_prompt_is_dense_and_tri_shapes_last_rows_are() -> None:
    n = 150
    q, k, v = qkv(n)
    dense = reference(q, k, v, torch.ones(n, n, dtype=torch.bool).tril())
    torch.testing.assert_close(a_shape(q, k, v, sink=3, local=n).out, dense, **TOLERANCE)
    tri = a_shape(q, k, v, sink=3, local=8, tail=40).out
    torch.testing.assert_close(tri[:, :, -40:], dense[:, :, -40:], **TOLERANCE)
    assert not torch.allclose(tri[:, :, :-40], dense[:, :, :-40], atol=1e-2)


# Grid.


@st.composite
def grids(draw: Any) -> tuple[Grid, int, Tensor, int]:
    sink = draw(st.integers(0, 20))
    start = sink + draw(st.integers(0, 40))
    flags = {name: draw(st.booleans()) for name in ("horizontal", "vertical", "slash")}
    stride = draw(st.sampled_from([1, 2, 3, 7, 28, 64, 500]))
    grid = Grid(sink, draw(st.integers(1, 100)), start, start + draw(st.integers(0, 260)), stride, **flags)
    heads, batch = draw(st.sampled_from([(1, 1), (3, 1), (2, 2)]))
    phase = torch.randint(0, stride, (batch, heads), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return grid, draw(st.integers(1, 300)), phase, draw(st.sampled_from([16, 80]))


@settings(max_examples=100)
@given(grids())
def test_a_grid_is_the_union_of_its_parts_without_a_dense_rest(case: Any) -> None:
    """Any length, stride, phase for each head, partial last period, lines longer than the video; each pair once."""
    grid, n, phase, dim = case
    q, k, v = qkv(n, phase.shape[1], dim, phase.shape[0])
    allowed = grid_visible(grid, phase, every(n), n)
    out, lse = grid_attention(q, k, v, grid, phase)
    torch.testing.assert_close(out, reference(q, k, v, allowed), **TOLERANCE)
    scores = (q @ k.transpose(-1, -2) * dim**-0.5).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1), **TOLERANCE)
    assert torch.equal(grid_seen(grid, phase, every(n), n), allowed.sum(-1))


def test_every_pair_of_a_grid_is_visited_exactly_once() -> None:
    """With equal scores and one-hot values, the output is 1 / count wherever a key was visited, and more if twice."""
    n = 96
    grid = Grid(5, 9, 11, 83, 7, slash=True)
    phase = torch.tensor([[3, 6]])
    q = torch.zeros(1, 2, n, n)
    out = grid_attention(q, q, torch.eye(n).expand(1, 2, n, n), grid, phase).out
    allowed = grid_visible(grid, phase, every(n), n)
    torch.testing.assert_close(out, allowed / allowed.sum(-1, keepdim=True), **TOLERANCE)


def test_a_stride_of_one_is_dense() -> None:
    n = 90
    for lines in ({"horizontal": False}, {"vertical": False}, {"horizontal": False, "vertical": False, "slash": True}):
        allowed = grid_visible(Grid(0, 1, 0, n, 1, **lines), torch.zeros(1, 1, dtype=torch.long), every(n), n)
        assert torch.equal(allowed[0, 0], torch.ones(n, n, dtype=torch.bool).tril())


def test_moving_tokens_by_residue_and_back_gives_what_addresses_give() -> None:
    """Sorted by (index mod stride, index div stride), lines are contiguous; the order is a bijection."""
    n, stride = 112, 7
    order = every(n).view(-1, stride).T.flatten()
    inverse = order.argsort()
    assert torch.equal(order[inverse], every(n))
    grid, phase = Grid(0, 5, 0, n, stride), torch.tensor([[2]])
    q, k, v = qkv(n, heads=1)
    moved = grid_visible(grid, phase, every(n), n)[..., order, :][..., order]  # causal by the original indices
    line = slice(2 * n // stride, 3 * n // stride)
    # Every row sees every line before it, in one block of columns.
    assert int(moved[0, 0, :, line].sum()) == sum((i + stride - 2) // stride for i in range(n))
    out = reference(q[:, :, order], k[:, :, order], v[:, :, order], moved)[:, :, inverse]
    torch.testing.assert_close(grid_attention(q, k, v, grid, phase).out, out, **TOLERANCE)


def planted(n: int, stride: int, phase: int) -> Tensor:
    """Softmax rows of a head that looks at columns ≡ phase: logits 6 there, 2 nearby, noise of one."""
    generator = torch.Generator().manual_seed(0)
    i, j = every(n)[:, None], every(n)
    logits = torch.randn(n, n, generator=generator) + 6.0 * (j % stride == phase) + 2.0 * (i - j < 64)
    return logits.masked_fill(j > i, float("-inf")).softmax(-1)[None, None]


def test_a_planted_grid_head_is_found_exactly_with_high_recall_at_low_density() -> None:
    n, stride, phase = 4096, 28, 11
    weights = planted(n, stride, phase)
    found = find_lines(weights[:, :, -64:], (7, 14, stride, 2 * stride, 100), start=0, stop=n)
    assert (int(found.stride), int(found.phase)) == (stride, phase)

    def recall_and_density(at: int) -> tuple[float, float]:
        grid = Grid(0, 128, 0, n, stride)
        allowed = grid_visible(grid, torch.tensor([[at]]), every(n), n)
        return float((weights * allowed).sum() / n), float(allowed.sum() / (n * (n + 1) / 2))

    recall, density = recall_and_density(phase)
    assert recall >= 0.95
    assert density <= 0.15
    assert recall_and_density(phase + 3)[0] < 0.5


def test_a_sum_prefers_divisors_and_a_mean_multiples_and_the_rule_neither() -> None:
    weights = planted(1024, 28, 5)[:, :, -64:]
    columns = weights.sum(-2)[0, 0]
    sums = {s: max(float(columns[p::s].sum()) for p in range(s)) for s in (7, 28, 56)}
    means = {s: max(float(columns[p::s].mean()) for p in range(s)) for s in (7, 28, 56)}
    assert max(sums, key=sums.__getitem__) == 7
    assert max(means, key=means.__getitem__) == 56
    found = find_lines(weights, (7, 28, 56), start=0, stop=1024)
    assert (int(found.stride), int(found.phase)) == (28, 5)
    assert int(find_lines(weights, (28,), start=0, stop=1024, phase=33).phase) == 5


# Vertical-slash.


@few
@given(
    st.integers(1, 260),
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5), st.integers(0, 9)),
    st.sampled_from([(1, 8), (1, 64), (2, 16)]),
)
def test_vertical_slash_is_the_mask_of_its_index(n: int, sizes: Any, more: Any) -> None:
    batch, block = more
    q, k, v = qkv(n, batch=batch)
    columns, slashes, first, near = sizes
    weights = last_weights(q, k, scale=0.25, tally=Tally())
    index = make_index(weights, columns=columns, slashes=slashes, first=first, near=near, block=block)
    tally = Tally()
    out, lse = vertical_slash(q, k, v, index, tally=tally)
    allowed = index.visible(every(n))
    torch.testing.assert_close(out, reference(q, k, v, allowed), **TOLERANCE)
    assert not lse.isneginf().any()
    assert tally.pairs == int(allowed.sum())
    assert torch.equal(index.seen(every(n)), allowed.sum(-1))
    # What was asked for is covered: the top columns, the top diagonals, and the forced ones.
    wanted = (every(n)[:, None] - every(n) < max(near, 1)) | (every(n) < first)
    assert bool((allowed | ~(wanted & torch.ones(n, n, dtype=torch.bool).tril())).all())
    top = diagonal_sums(weights).topk(min(max(slashes - max(near, 1), 0), n)).indices if near == 0 else None
    if top is not None and top.numel():
        offset = int(top[0, 0, 0])
        assert bool(allowed[0, 0].diagonal(-offset).all())


def test_blocks_and_columns_of_a_row_block_are_disjoint_and_rebuild_the_mask() -> None:
    n, block = 128, 16
    q, k, _ = qkv(n)
    index = make_index(
        last_weights(q, k, scale=0.25, tally=Tally()), columns=20, slashes=20, near=3, first=2, block=block
    )
    found = lists(index, every(n // block))
    rebuilt = torch.zeros(1, 2, n, n, dtype=torch.long)
    for h in range(2):
        for r in range(n // block):
            rows = slice(r * block, (r + 1) * block)
            rebuilt[0, h, rows, rows] += torch.ones(block, block, dtype=torch.long).tril()
            for b in found.blocks[0, h, r, : found.n_blocks[0, h, r]].tolist():
                rebuilt[0, h, rows, b * block : (b + 1) * block] += 1
            for c in found.columns[0, h, r, : found.n_columns[0, h, r]].tolist():
                rebuilt[0, h, rows, c] += 1
    assert torch.equal(rebuilt, index.visible(every(n)).long())


def test_an_index_without_columns_or_slashes_still_sees_itself() -> None:
    """A published builder read out of bounds where a list was empty."""
    n = 70
    q, k, v = qkv(n)
    nothing = Index(torch.empty(1, 2, 0, dtype=torch.long), torch.zeros(1, 2, 5, dtype=torch.bool), 16, n)
    nothing.diagonals[..., 0] = True
    out, _ = vertical_slash(q, k, v, nothing)
    torch.testing.assert_close(out, reference(q, k, v, nothing.visible(every(n))), **TOLERANCE)


def test_all_columns_and_slashes_are_dense() -> None:
    n = 130
    q, k, v = qkv(n)
    index = make_index(last_weights(q, k, scale=0.25, tally=Tally()), columns=n, slashes=n)
    dense = reference(q, k, v, torch.ones(n, n, dtype=torch.bool).tril())
    torch.testing.assert_close(vertical_slash(q, k, v, index).out, dense, **TOLERANCE)


def test_only_the_row_blocks_that_are_asked_for_are_computed() -> None:
    n, block = 70, 16
    q, k, v = qkv(n)
    index = make_index(
        last_weights(q, k, scale=0.25, tally=Tally()), columns=5, slashes=5, near=3, first=2, block=block
    )
    whole = vertical_slash(q, k, v, index)
    some = vertical_slash(q, k, v, index, row_blocks=torch.tensor([1, 4]))
    rows = torch.cat([every(n)[16:32], every(n)[64:]])
    torch.testing.assert_close(some.out[:, :, rows], whole.out[:, :, rows], **TOLERANCE)
    assert bool(some.lse[:, :, :16].isneginf().all())


def test_diagonals_of_a_batch_are_each_prompts_own() -> None:
    """A public helper hard-codes a batch of one."""
    weights = torch.rand(3, 2, 5, 11)
    for o in (0, 3, 10):
        want = torch.stack([weights[..., r, 6 + r - o] for r in range(5) if 6 + r - o >= 0]).sum(0)
        torch.testing.assert_close(diagonal_sums(weights)[..., o], want)


def test_a_batch_is_its_prompts_one_by_one() -> None:
    n = 100
    q, k, v = qkv(n, batch=2)
    both = make_index(last_weights(q, k, scale=0.25, tally=Tally()), columns=9, slashes=9, near=4, first=2, block=16)
    for b in range(2):
        one = [x[b : b + 1] for x in (q, k, v)]
        index = make_index(
            last_weights(*one[:2], scale=0.25, tally=Tally()), columns=9, slashes=9, near=4, first=2, block=16
        )
        assert torch.equal(index.visible(every(n))[0], both.visible(every(n))[b])


# What all of them are made of.


def test_last_weights_are_the_last_rows_of_dense_attention_whatever_the_length() -> None:
    for n in (5, 64, 100):  # shorter than the window too
        q, k, _ = qkv(n, heads=4)
        k = k[:, :2]
        scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.25
        dense = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        torch.testing.assert_close(last_weights(q, k, scale=0.25, tally=Tally()), dense[:, :, -64:], **TOLERANCE)


def test_a_row_without_keys_is_zeros_and_strong_negative_scores_are_no_nan() -> None:
    """Public kernels left NaN for such rows, and began their maximum at zero."""
    q, k, v = qkv(8)
    mask = torch.ones(8, 8, dtype=torch.bool).tril(-1)
    out, lse = attend(q, k, v, scale=0.25, tally=Tally(), mask=mask)
    assert bool((out[:, :, 0] == 0).all())
    assert bool(lse[:, :, 0].isneginf().all())
    far = a_shape(q * 0 - 100, k * 0 + 100, v, sink=1, local=2)
    assert not far.out.isnan().any()


@pytest.mark.parametrize("transposed", [True, False])
def test_taking_rows_is_indexing(transposed: bool) -> None:
    x = torch.randn(9, 3, 4).transpose(0, 1) if transposed else torch.randn(3, 9, 4)
    rows = torch.randint(0, 9, (3, 2, 5))
    want = torch.stack([x[h][rows[h]] for h in range(3)])
    assert torch.equal(take(x, rows), want)


def test_without_the_cpu_kernel_the_calls_are_the_same() -> None:
    """float16 on the CPU takes the written-out path, as other devices do."""
    q, k, v = qkv(20)
    mask = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    for options in ({"causal": True}, {"mask": mask}, {}):
        fast = attend(q, k, v, scale=0.25, tally=Tally(), **options)
        plain = attend(q.half(), k.half(), v.half(), scale=0.25, tally=Tally(), **options)
        # Three significant digits of float16, at values near one.
        torch.testing.assert_close(plain.out.float(), fast.out, rtol=0, atol=5e-3)


# Tiles of scores: what the three patterns are computed in on a CPU.


def test_a_softmax_tells_its_log_sum_exp_by_each_rows_own_key_or_else_looks_again() -> None:
    """A key hundreds below the row's best has no probability in float32, but the sum is none the less known."""
    raw = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    for far in (0.0, -60.0, -500.0):
        raw[1, 2, 4] = far
        asked: list[int] = []

        def scores(asked: list[int] = asked) -> Tensor:
            asked.append(1)
            return raw.clone()

        weights, lse = softmaxed(scores, lambda found: found[:, :, 4])
        torch.testing.assert_close(weights, raw.softmax(-1), **TOLERANCE)
        torch.testing.assert_close(lse, raw.logsumexp(-1), **TOLERANCE)
        assert len(asked) == (2 if far == -500 else 1)


def test_keys_that_all_lie_far_above_a_querys_own_leave_its_log_sum_exp_right() -> None:
    """As with the first tokens of trained models, which take what a head has no use for."""
    n = 40
    q, k, v = qkv(n)
    q, k = q.clone(), k * 0.01
    q[..., 0], k[:, :, :2, 0] = 30.0, 60.0
    allowed = a_shape_visible(every(n), n, sink=2, local=5)
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~allowed, float("-inf"))
    index = Index(torch.arange(2).expand(1, 2, -1), torch.eye(5, dtype=torch.bool)[:1].expand(1, 2, -1), 8, n)
    grid = Grid(2, 5, 4, 30, 7)
    phase = torch.tensor([[1, 4]])
    torch.testing.assert_close(a_shape(q, k, v, sink=2, local=5).lse, scores.logsumexp(-1), rtol=1e-6, atol=1e-5)
    for found, seen in (
        (vertical_slash(q, k, v, index), index.visible(every(n))),
        (grid_attention(q, k, v, grid, phase), grid_visible(grid, phase, every(n), n)),
    ):
        right = (q @ k.transpose(-1, -2) / 4).masked_fill(~seen, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(found.lse, right, rtol=1e-6, atol=1e-5)
        # Scores of 450 are float32 to 3e-5, which weights then are of themselves.
        torch.testing.assert_close(found.out, reference(q, k, v, seen), rtol=0, atol=2e-4)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_heads_that_share_keys_and_memory_that_is_short_change_nothing(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, small: bool
) -> None:
    """Six heads on two key heads are six on copies of them, whatever lies where, and in as many tiles as memory asks for."""
    n = 150
    if small:
        monkeypatch.setattr("vlmbench.kernels.calls.tiles.SCORES_BYTES", 1)
        monkeypatch.setattr("vlmbench.kernels.vertical_slash.gathered.GATHER_BYTES", 1)
        monkeypatch.setattr("vlmbench.kernels.vertical_slash.gathered.LISTED", 3)
    q, (_, k, v) = qkv(n, heads=6)[0], qkv(n)
    if not transposed:
        q, k, v = (x.contiguous() for x in (q, k, v))
    copies = [x.repeat_interleave(3, 1) for x in (k, v)]
    index = make_index(last_weights(q, k, scale=0.25, tally=Tally()), columns=9, slashes=20, near=4, first=2, block=16)
    grid, phase = Grid(3, 20, 5, 140, 7, slash=True), torch.tensor([[0, 1, 6, 3, 3, 3]])
    for call in (
        lambda k, v: a_shape(q, k, v, sink=5, local=30, tail=9),
        lambda k, v: grid_attention(q, k, v, grid, phase),
        lambda k, v: vertical_slash(q, k, v, index),
        lambda k, v: attend(q, k, v, scale=0.25, tally=Tally(), causal=True),
    ):
        for ours, theirs in zip(call(k, v), call(*copies), strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    n = 60
    q, k, v = (x.to(dtype) for x in qkv(n))
    index = Index(torch.arange(3).expand(1, 2, -1), torch.eye(8, dtype=torch.bool)[:1].expand(1, 2, -1), 8, n)
    grid, phase = Grid(2, 5, 4, 50, 7), torch.tensor([[1, 4]])
    for found, allowed in (
        (a_shape(q, k, v, sink=2, local=5), a_shape_visible(every(n), n, sink=2, local=5)),
        (grid_attention(q, k, v, grid, phase), grid_visible(grid, phase, every(n), n)),
        (vertical_slash(q, k, v, index), index.visible(every(n))),
    ):
        assert (found.out.dtype, found.lse.dtype) == (dtype, torch.float32)
        # Half a unit in the last place of values near one, after arithmetic that is exact beside it.
        atol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-12
        torch.testing.assert_close(found.out.double(), reference(q, k, v, allowed).double(), rtol=0, atol=2 * atol)


def test_impossible_sizes_are_refused() -> None:
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match="local must be at least 1"):
        a_shape(q, k, v, sink=1, local=0)
    with pytest.raises(ValueError, match="sees itself"):
        Grid(4, 0, 4, 8, 2)
    with pytest.raises(ValueError, match="strides must be at least 1"):
        find_lines(torch.rand(1, 1, 4, 8), (), start=0, stop=8)
    with pytest.raises(ValueError, match="index is for 4 tokens"):
        vertical_slash(q, k, v, Index(torch.zeros(1, 2, 1, dtype=torch.long), torch.ones(1, 2, 1) > 0, 8, 4))
