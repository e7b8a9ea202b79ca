"""Block attention on a GPU: its tables, its two rivals, what the dispatcher does without it, and true shapes on CUDA.

The kernel itself is run by `interpreted_block_attention.py` under Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.on_triton import CPU, check_rows, qkv, run_interpreted, run_without_triton
from vlmbench.kernels.block_attention import (
    Plan,
    SlowPath,
    attend,
    block_attention,
    blocks,
    flex,
    forget,
    fused,
    is_fast,
    make_plan,
    reference,
    runs_fast,
    tiles,
    varlen,
)
from vlmbench.methods.pevlm import Pevlm
from vlmbench.trace import Trace

SMALL = Plan(17, ((17, 50), (50, 83), (83, 97)), 111)


@st.composite
def plans(draw: Any) -> Plan:
    edges = [draw(st.integers(0, 40))]
    for _ in range(draw(st.integers(0, 6))):
        edges.append(edges[-1] + draw(st.integers(1, 40)))
    return Plan(edges[0], tuple(pairwise(edges)), edges[-1] + draw(st.integers(1, 40)))


def test_the_kernel_under_the_interpreter() -> None:
    run_interpreted("interpreted_block_attention.py")


def test_importing_needs_no_triton() -> None:
    run_without_triton(
        "from vlmbench.kernels.block_attention import fused, flex, varlen, is_fast\n"
        "import torch; assert is_fast(torch.device('cpu'))"
    )


@given(plans(), st.sampled_from([16, 64, 128]), st.integers(1, 7))
def test_query_tiles_cover_every_row_once_and_see_what_the_rule_says(plan: Plan, rows: int, groups: int) -> None:
    covered = torch.zeros(plan.length * groups, dtype=torch.int64)
    lengths = []
    for first, stop, own, far in tiles.query_tiles(plan, rows, groups, CPU).tolist():
        last = min(first + rows, stop)
        covered[first:last] += 1
        i, j = torch.arange(first, last) // groups, torch.arange(plan.length)
        assert torch.equal(plan.visible(i), (j <= i[:, None]) & ((j < far) | (j >= own)))
        lengths.append(far + int(i[-1]) - own)
    assert (covered == 1).all()
    assert lengths == sorted(lengths, reverse=True)


@given(plans(), st.sampled_from([16, 32]))
def test_the_tiles_of_flex_attention_are_those_of_the_mask(plan: Plan, tile: int) -> None:
    some, whole = flex.tile_table(plan, tile)
    for i in range(len(some)):
        for j in range(len(some)):
            rows = plan.allow[i * tile : (i + 1) * tile]
            part = rows[:, j * tile : (j + 1) * tile]
            assert bool(some[i, j]) == bool(part.any())
            assert bool(whole[i, j]) == (bool(part.all()) and part.shape[1] == tile)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(plans())
def test_flex_attention_is_the_reference(plan: Plan) -> None:
    q, k, v = qkv(plan.length, 4, 2, 16)
    # float32 rounding of averages of at most 320 values near one.
    torch.testing.assert_close(
        flex.block_attention(q, k, v, plan, scale=0.3),
        reference.block_attention(q, k, v, plan, scale=0.3),
        rtol=0,
        atol=5e-6,
    )


def test_flex_attention_lists_the_tiles_it_needs() -> None:
    """Those with some pairs go through the rule, whole ones do not, and the others are not computed."""
    plan = Plan(300, ((300, 900), (900, 1500)), 1600)
    mask = flex.block_mask(plan, CPU)
    some, whole = flex.tile_table(plan)
    for counts, indices, expected in (
        (mask.kv_num_blocks, mask.kv_indices, some & ~whole),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
    ):
        assert counts is not None
        assert indices is not None
        for row, columns in enumerate(expected):
            listed = indices[0, 0, row, : int(counts[0, 0, row])]
            assert listed.tolist() == columns.nonzero()[:, 0].tolist()


@given(plans())
def test_dense_calls_over_packed_sequences_are_the_reference(plan: Plan) -> None:
    q, k, v = qkv(plan.length, 4, 2, 16)
    # float32 rounding of averages of at most 320 values near one.
    torch.testing.assert_close(
        varlen.block_attention(q, k, v, plan, scale=0.3),
        reference.block_attention(q, k, v, plan, scale=0.3),
        rtol=0,
        atol=5e-6,
    )


def test_the_cpu_keeps_its_own_path() -> None:
    q, k, v = qkv(111, 4, 2, 16)
    assert is_fast(CPU)
    assert runs_fast(q, k, v)
    assert torch.equal(block_attention(q, k, v, SMALL), blocks.block_attention(q, k, v, SMALL))


def test_a_device_without_a_kernel_takes_the_reference_and_says_so_once() -> None:
    q, k, v = qkv(111, 4, 2, 16)
    meta = [x.to("meta") for x in (q, k, v)]
    assert not is_fast(meta[0].device)
    assert not runs_fast(meta[0], meta[1], meta[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            out = block_attention(meta[0], meta[1], meta[2], SMALL)
    assert out.shape == q.shape
    assert [each.category for each in caught] == [SlowPath]
    assert "needs CUDA, not meta" in str(caught[0].message)


def test_strictness_turns_the_warning_into_an_error() -> None:
    q, k, v = (x.to("meta") for x in qkv(111, 4, 2, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        for _ in range(2):
            with pytest.raises(SlowPath, match="as slow as dense"):
                block_attention(q, k, v, SMALL)


def test_what_is_refused_only_at_the_launch_is_marked_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: Any, **options: Any) -> Tensor:
        raise fused.Refused("No tiling fits this card.")

    monkeypatch.setattr(fused, "refusal", lambda *tensors: None)
    monkeypatch.setattr(fused, "block_attention", launch)
    monkeypatch.setattr(fused, "no_kernel", lambda device: None)
    q, k, v = (x.to("meta") for x in qkv(111, 4, 2, 16))
    assert runs_fast(q, k, v)
    with pytest.warns(SlowPath, match="No tiling fits"):
        assert attend(q, k, v, SMALL).masked
    given: dict[str, Any] = {}
    trace = Trace(facts={"masked": False})
    Pevlm().install(SimpleNamespace(attention=lambda fn: given.update(fn=fn)), trace)  # type: ignore[arg-type]
    with pytest.warns(SlowPath, match="No tiling fits"):
        given["fn"](None, q, k, v, None, block_plan=SMALL)
    assert trace.facts["masked"]
    assert not attend(*qkv(111, 4, 2, 16), SMALL).masked


def test_what_is_made_from_a_plan_is_kept_until_it_is_forgotten() -> None:
    made: list[Callable[[], Any]] = [
        lambda: tiles.query_tiles(SMALL, 64, 2, CPU),
        lambda: flex.block_mask(SMALL, CPU),
        lambda: varlen._on((0, 3), CPU),
    ]
    first = [make() for make in made]
    assert all(make() is one for make, one in zip(made, first, strict=True))
    forget()
    assert not any(make() is one for make, one in zip(made, first, strict=True))


def test_each_refusal_is_a_sentence_with_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # past the question of the device; nothing is launched here
    q, k, v = qkv(111, 4, 2, 16)
    assert fused.refusal(q, k, v) is None
    wide = torch.zeros(1, 4, 111, 256)
    for tensors, words in (
        ((q.double(), k.double(), v.double()), "float64, float64, float64"),
        ((q, k, v.half()), "float32, float32, float16"),
        ((wide, wide, wide), "256, 256, 256"),
        ((q, k, v[..., :8]), "16, 16, 8"),
        ((q.transpose(2, 3).contiguous().transpose(2, 3), k, v), "side by side"),
        ((q.clone().requires_grad_(), k, v), "gradient"),
    ):
        assert words in str(fused.refusal(*tensors))
        with pytest.raises(fused.Refused, match=words):
            fused.block_attention(*tensors, SMALL)
    with pytest.raises(fused.Refused, match=r"scale of -1\.0"):
        fused.block_attention(q, k, v, SMALL, scale=-1.0)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a GPU" in str(fused.refusal(q, k, v))
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert "triton is not installed" in str(fused.refusal(q, k, v))


@pytest.mark.parametrize("op", [fused, flex, varlen])
def test_tensors_that_are_not_the_plans_are_refused(op: Any) -> None:
    q, k, v = qkv(111, 4, 2, 16)
    with pytest.raises(ValueError, match="for 111 tokens"):
        op.block_attention(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], SMALL)
    with pytest.raises(ValueError, match="for 111 tokens; q has 111, k has 111 and v has 110"):
        op.block_attention(q, k, v[:, :, :-1], SMALL)
    with pytest.raises(ValueError, match="k has 2 heads and v has 1"):
        op.block_attention(q, k, v[:, :1], SMALL)
    with pytest.raises(ValueError, match="batch is 2"):
        op.block_attention(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), SMALL)
    with pytest.raises(ValueError, match="no multiple"):
        op.block_attention(q[:, :3], k, v, SMALL)


# On a GPU. The shape is gpu-pevlm of the fixed workloads with 32 frames instead of 256.


def pevlm_plan(frames: int = 32, per_frame: int = 257) -> Plan:
    units = [(14 + per_frame * i, 14 + per_frame * (i + 1)) for i in range(frames)]
    plan = make_plan(units, 14 + per_frame * frames + 60, sink=4, block=8)
    assert plan is not None
    return plan


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, roundings: int = 2) -> None:
    """Every region's edges among the rows."""
    edges = tuple(edge for region in tiles.regions(plan) for edge in (region.start, region.stop - 1))

    def visible(rows: Tensor) -> Tensor:
        return plan.visible(rows.cpu()).to(q.device).expand(q.shape[1], -1, -1)

    check_rows(out, q, k, v, visible, edges=edges, roundings=roundings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("attend", "roundings"),
    # Joining two parts rounds each of them, the share of the one, and the result: three more, twice for the blocks' rows.
    [(fused.block_attention, 2), (flex.block_attention, 2), (varlen.block_attention, 6)],
    ids=["fused", "flex", "varlen"],
)
def test_true_shape_on_cuda(attend: Callable[..., Tensor], roundings: int, dtype: torch.dtype) -> None:
    plan = pevlm_plan()
    q, k, v = qkv(plan.length, 28, 4, 128, dtype, "cuda")
    check(attend(q, k, v, plan), q, k, v, plan, roundings)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_head_dimensions_on_cuda(dim: int, dtype: torch.dtype) -> None:
    plan = pevlm_plan(frames=13, per_frame=37)
    q, k, v = qkv(plan.length, 6, 2, dim, dtype, "cuda")
    tile = (
        fused.Tile(64, 16, 8) if dtype == torch.float32 else fused.Tile(64, 64)
    )  # tuning would compile seven for each
    check(fused.block_attention(q, k, v, plan, tile=tile), q, k, v, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_tiling_on_cuda_writes_every_row_and_reads_no_other(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs lie between rows of NaN, and so do outputs before they are written."""
    from vlmbench.kernels.block_attention import fused_kernel

    plan, empty = pevlm_plan(frames=13, per_frame=37), torch.empty
    framed = []
    for seed, heads in enumerate((6, 2, 2)):
        buffer = torch.full((1, plan.length + 256, heads, 136), float("nan"), dtype=dtype, device="cuda")
        inner = buffer[:, 128:-128, :, :128]
        inner.copy_(torch.randn(inner.shape, generator=torch.Generator().manual_seed(seed)))
        framed.append(inner.transpose(1, 2))
    q, k, v = framed
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    ran = 0
    for config in fused_kernel.WIDE if dtype == torch.float32 else fused_kernel.SHORT:
        tile = fused.Tile(config.kwargs["BM"], config.kwargs["BN"], config.num_warps, config.num_stages)
        try:
            out = fused.block_attention(q, k, v, plan, tile=tile)
        except fused.Refused:
            continue  # more shared memory than this card has
        ran += 1
        check(out, q, k, v, plan)
    assert ran


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 3], ids=["rows-apart", "heads-apart"])
def test_offsets_pass_two_to_the_31_on_cuda(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, dim = Plan(0, (), 127), 16  # keys from 64 on begin a tile of every tiling
    apart = 2**31 // 60 if heads == 1 else 2**30
    by_head, by_row = (0, apart) if heads == 1 else (apart, dim)
    numbers = torch.empty(apart * (127 if heads == 1 else heads), dtype=torch.float16, device="cuda")
    near = qkv(127, heads, heads, dim, torch.float16, "cuda")
    room = 4 * 127 * dim
    q, k, v = (numbers.as_strided((1, heads, 127, dim), (0, by_head, by_row, 1), room * i) for i in range(3))
    for x, original in zip((q, k, v), near, strict=True):
        x.copy_(original)
    here = fused.block_attention(*near, plan)
    empty = torch.empty
    # The kernel's own output is no exception.
    monkeypatch.setattr(
        torch,
        "empty",
        lambda size, **options: (
            numbers.as_strided(size, (0, by_row, by_head, 1), room * 3) if len(size) == 4 else empty(size, **options)
        ),
    )
    out = fused.block_attention(q, k, v, plan)
    assert out.stride()[1:3] == (by_head, by_row)
    assert torch.equal(out, here)


@pytest.mark.gpu
def test_the_choice_of_tiles_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fused.block_attention(*qkv(111, 2, 1, 40, torch.bfloat16, "cuda"), SMALL)  # a size that no other test tunes
    assert list(tmp_path.rglob("*.autotune.json"))


@pytest.mark.gpu
def test_cuda_takes_the_kernel_and_wide_heads_the_reference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        block_attention(*qkv(111, 4, 2, 64, torch.bfloat16, "cuda"), SMALL)
    with pytest.warns(SlowPath, match="256, 256, 256"):
        block_attention(*qkv(111, 4, 2, 256, torch.bfloat16, "cuda"), SMALL)
