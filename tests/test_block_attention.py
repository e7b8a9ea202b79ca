"""Block attention and its planner: the visibility rule, and that nothing is lost or invented."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from vlmbench.kernels.block_attention import Plan, blocks, is_fast, make_plan
from vlmbench.kernels.block_attention.adaptive import adaptive_attention
from vlmbench.kernels.block_attention.dense import attend, causal_blocks
from vlmbench.kernels.block_attention.reference import block_attention
from vlmbench.live import LiveStorages


@st.composite
def planned(draw: Any) -> tuple[list[tuple[int, int]], int, Plan | None, dict[str, Any]]:
    """Units of 1 to 4 tokens behind `p` prefix tokens and before `u` suffix tokens, and a plan over them."""
    prefix, suffix = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    units, cursor = [], prefix
    for size in sizes:
        units.append((cursor, cursor + size))
        cursor += size
    options = {
        "sink": draw(st.integers(0, 14)),
        "block": draw(st.integers(1, 14)),
        "remainder": draw(st.sampled_from(["tail", "head", "last"])),
    }
    length = cursor + suffix
    return units, length, make_plan(units, length, **options), options


@given(planned())
def test_regions_partition_the_prompt_on_unit_edges(case: Any) -> None:
    units, length, plan, options = case
    if plan is None:
        assert options["sink"] >= len(units)
        return
    edges = {unit[0] for unit in units} | {units[-1][1]}
    cursor = plan.sink
    for start, stop in plan.blocks:
        assert start == cursor < stop
        assert {start, stop} <= edges
        cursor = stop
    assert plan.tail == cursor <= units[-1][1] < length  # no suffix token in a block, and a tail that is never empty
    assert plan.sink == units[options["sink"]][0]
    if options["remainder"] != "tail":
        assert plan.tail == units[-1][1]


@given(planned())
def test_the_mask_is_the_rule_and_the_pair_count_is_its_sum(case: Any) -> None:
    _, length, plan, _ = case
    if plan is None:
        return
    region = [0] * plan.sink + [k + 1 for k, (a, b) in enumerate(plan.blocks) for _ in range(a, b)]
    region += [-1] * (length - plan.tail)
    for i in range(length):
        for j in range(length):
            allowed = j <= i and (region[i] == -1 or region[j] == 0 or region[i] == region[j])
            assert bool(plan.allow[i, j]) == allowed
    assert plan.pairs == int(plan.allow.sum())


def three_passes(q: Any, k: Any, v: Any, plan: Plan) -> Any:
    """The paper's procedure: sink alone, each block behind a copy of the sink's keys, then the tail over everything."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    def part(start: int, stop: int, keys: list[int]) -> Any:
        columns = torch.tensor(keys, dtype=torch.long)
        rows = torch.arange(start, stop)
        return functional.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=columns[None] <= rows[:, None]
        )

    sink = list(range(plan.sink))
    out = [part(0, plan.sink, sink)] if sink else []
    out += [part(a, b, [*sink, *range(a, b)]) for a, b in plan.blocks]
    out.append(part(plan.tail, plan.length, list(range(plan.length))))
    return torch.cat(out, dim=2)


@given(planned())
def test_one_masked_pass_equals_the_three_passes(case: Any) -> None:
    _, length, plan, _ = case
    if plan is None:
        return
    q, k, v = (
        torch.randn(1, h, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2)
    )
    # float64: the two only differ in the order of sums.
    torch.testing.assert_close(block_attention(q, k, v, plan), three_passes(q, k, v, plan), rtol=0, atol=1e-12)


def test_noise_in_one_block_reaches_the_tail_and_nothing_else() -> None:
    plan = make_plan([(2 + 3 * i, 5 + 3 * i) for i in range(6)], 24, sink=1, block=2, remainder="tail")
    assert plan is not None
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 4) for _ in range(3))
    before = block_attention(q, k, v, plan)
    start, stop = plan.blocks[1]
    noise = torch.zeros(24, 1)
    noise[start:stop] = 1
    changed = (block_attention(q + noise, k + noise, v + noise, plan) != before).any(-1).any(1)[0]
    inside = torch.zeros(24, dtype=torch.bool)
    inside[start:stop] = inside[plan.tail :] = True
    assert torch.equal(changed, inside)


def test_one_block_is_causal_attention() -> None:
    plan = make_plan([(i, i + 1) for i in range(3, 9)], 12, sink=0, block=99, remainder="tail")
    assert plan is not None
    assert torch.equal(plan.allow, torch.ones(12, 12, dtype=torch.bool).tril())


def test_doubling_the_video_at_most_doubles_the_pairs() -> None:
    sink, block, per = 2, 4, 5
    for frames in (8 * (sink + block), 16 * (sink + block)):
        pairs = []
        for t in (frames, 2 * frames):
            units = [(3 + per * i, 3 + per * (i + 1)) for i in range(t)]
            plan = make_plan(units, 3 + per * t + 7, sink=sink, block=block)
            assert plan is not None
            pairs.append(plan.pairs)
        assert pairs[1] <= 2.1 * pairs[0]


def test_lengths_that_do_not_fit_the_plan_are_refused() -> None:
    plan = make_plan([(0, 2), (2, 4)], 5, sink=0, block=1)
    assert plan is not None
    q = torch.zeros(1, 1, 6, 2)
    with pytest.raises(ValueError, match="for 5 tokens"):
        block_attention(q, q, q, plan)


def qkv(length: int, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Any, Any, Any]:
    """As a model hands them over: ``[1, N, H, D]`` in memory, seen as ``[1, H, N, D]``."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(1, length, h, dim).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    return q, k, v


@given(planned())
def test_the_fast_path_is_the_reference(case: Any) -> None:
    _, length, plan, _ = case
    if plan is None:
        return
    q, k, v = qkv(length)
    assert is_fast(q.device)
    # float32 rounding of sums of at most 60 terms near one.
    torch.testing.assert_close(blocks.block_attention(q, k, v, plan), block_attention(q, k, v, plan), rtol=0, atol=5e-6)


def test_the_fast_path_takes_any_grouping_of_heads_and_a_scale() -> None:
    plan = make_plan([(3 + 4 * i, 7 + 4 * i) for i in range(9)], 44, sink=2, block=3)
    assert plan is not None
    for heads, kv_heads in ((6, 6), (6, 2), (7, 1)):
        q, k, v = qkv(44, heads, kv_heads)
        torch.testing.assert_close(
            blocks.block_attention(q, k, v, plan, scale=0.3),
            block_attention(q, k, v, plan, scale=0.3),
            rtol=0,
            atol=5e-6,
        )


def test_the_fast_path_holds_no_mask_and_no_copy_of_the_sink() -> None:
    """Its memory is linear in the prompt: a mask or a sink for each block would be far above the bound."""
    per, frames = 8, 128
    plan = make_plan([(2 + per * i, 2 + per * (i + 1)) for i in range(frames)], 2 + per * frames + 6, sink=32, block=1)
    assert plan is not None
    q, k, v = qkv(plan.length)
    with LiveStorages([q, k, v]) as live:
        before = live.current
        blocks.block_attention(q, k, v, plan)
    # The output and, for one head of each group, three more of its size with their log-sum-exps.
    one = q.numel() * 4
    assert live.peak - before < 4 * one
    assert plan.length**2 > 4 * one  # even a mask of one byte a pair would not fit
    assert len(plan.blocks) * plan.sink * 16 * 2 * 4 > 4 * one  # nor would a sink for each block


def test_the_fast_path_refuses_what_it_would_get_wrong() -> None:
    plan = make_plan([(0, 2), (2, 4)], 5, sink=0, block=1)
    assert plan is not None
    q = torch.zeros(2, 1, 5, 2)
    with pytest.raises(ValueError, match="batch is 2"):
        blocks.block_attention(q, q, q, plan)
    with pytest.raises(ValueError, match="for 5 tokens"):
        blocks.block_attention(q[:1, :, :4], q[:1, :, :4], q[:1, :, :4], plan)


@given(planned(), st.floats(0.5, 2), st.floats(0.5, 2))
def test_adaptive_attention_is_its_formula(case: Any, temperature: float, scale: float) -> None:
    """Against softmax written out in float64: context scores over T, the context's weight to the power s · T."""
    _, length, plan, _ = case
    if plan is None or plan.tail == 0:
        return
    q, k, v = qkv(length)
    rows, context = q[:, :, plan.tail :], (plan.sink, plan.tail)
    ours = adaptive_attention(rows, k, v, context, temperature=temperature, scale=scale, scaling=0.25)
    wide, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = 0.25 * rows.double() @ wide.transpose(-1, -2)
    i, j = torch.arange(plan.tail, length)[:, None], torch.arange(length)[None]
    inside = (j >= plan.sink) & (j < plan.tail)
    own = scores.masked_fill(inside | (j > i), float("-inf"))
    far = (scores / temperature).masked_fill(~inside, float("-inf"))
    lse = far.logsumexp(-1, keepdim=True)
    weights = own.exp() + (far - lse).exp() * (lse * scale * temperature).exp()
    theirs = weights @ values / weights.sum(-1, keepdim=True)
    # float32 rounding of sums of at most 60 terms near one.
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


def test_dense_attention_without_a_kernel_is_the_same() -> None:
    """float16 has no CPU kernel that returns its log-sum-exp; the written-out path is what other devices take too."""
    q, k, v = qkv(20)
    for causal in (True, False):
        fast, fast_lse = attend(q[:, :2], k, v, causal=causal, scale=0.25)
        plain, plain_lse = attend(q[:, :2].half(), k.half(), v.half(), causal=causal, scale=0.25)
        # Three significant digits of float16, at values near one.
        torch.testing.assert_close(plain.float(), fast, rtol=0, atol=5e-3)
        torch.testing.assert_close(plain_lse, fast_lse, rtol=0, atol=5e-3)


@pytest.mark.parametrize("size", [96, 256, 512, 1024, 514])
def test_halved_causal_blocks_are_causal_attention(size: int) -> None:
    torch.manual_seed(size)
    q, k, v = (torch.randn(3, 2, size, 8) for _ in range(3))
    whole = attend(q, k, v, causal=True, scale=0.3)
    halved = causal_blocks(q, k, v, scale=0.3)
    # float32 rounding of averages of values near one.
    torch.testing.assert_close(halved.out, whole.out, rtol=0, atol=5e-6)
    torch.testing.assert_close(halved.lse, whole.lse, rtol=0, atol=1e-5)
