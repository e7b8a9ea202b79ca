"""The Triton kernels of sparse patterns under Triton's interpreter. Run by `test_sparse_triton.py` in its own process.

Memory is poisoned, products are counted and bfloat16 is widened as in `interpreted_block_attention`, whose fixtures these are.
"""

from __future__ import annotations

import inspect
import mmap
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.interpreted_block_attention import dots, framed, poison  # noqa: F401
from vlmbench import mm_attention, mm_boundary
from vlmbench.kernels import a_shape as a_shape_op
from vlmbench.kernels import grid as grid_op
from vlmbench.kernels import vertical_slash as vertical_slash_op
from vlmbench.kernels.a_shape import visible as a_shape_visible
from vlmbench.kernels.a_shape.fused import a_shape
from vlmbench.kernels.calls import Tally, last_weights
from vlmbench.kernels.grid import Grid
from vlmbench.kernels.grid import visible as grid_visible
from vlmbench.kernels.grid.fused import grid_attention, pattern
from vlmbench.kernels.sparse_lines import Pattern, Table, attended, fused
from vlmbench.kernels.sparse_lines.fused import Tile, dense
from vlmbench.kernels.vertical_slash import Index, make_index
from vlmbench.kernels.vertical_slash.fused import behind_columns, vertical_slash
from vlmbench.mm_patterns import Head, Intra, Run, Scene

QKV = tuple[Tensor, Tensor, Tensor]


def qkv(n: int, heads: int = 2, kv_heads: int = 1, dim: int = 16, dtype: torch.dtype = torch.float32) -> QKV:
    q, k, v = (framed(n, h, dim, dtype, seed) for seed, h in enumerate((heads, kv_heads, kv_heads)))
    return q, k, v


def every(n: int) -> Tensor:
    return torch.arange(n)


def index_of(q: Tensor, k: Tensor, block: int = 64, columns: int = 9, slashes: int = 12) -> Index:
    weights = last_weights(q, k, scale=0.25, tally=Tally())
    return make_index(weights, columns=columns, slashes=slashes, first=2, near=3, block=block)


def check(found: Any, q: Tensor, k: Tensor, v: Tensor, allow: Tensor, launches: int = 1) -> None:
    """Against softmax written out in float64 under `allow`, to ``[B, H, n, N]``; a row that sees no key is zeros.

    The bound is `interpreted_block_attention.check`'s; a second launch goes on from a rounded output, once more u P.
    """
    groups, dim, scale, keys = q.shape[1] // k.shape[1], q.shape[-1], q.shape[-1] ** -0.5, k.shape[2]
    wide, long, values = q.double(), *(x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = (scale * wide @ long.transpose(-1, -2)).masked_fill(~allow, float("-inf"))
    weights = scores.softmax(-1).nan_to_num()
    info = torch.finfo(q.dtype)
    e = (dim + 4) * 2**-24 * scale * float(wide.norm(dim=-1).max() * long.norm(dim=-1).max())
    u = info.eps if q.dtype == torch.bfloat16 else info.eps / 2
    relative = (1 + launches) * u + 2 * e + 2 * launches * (keys + 8) * 2**-24
    absolute = launches * (keys + 1) * info.tiny * info.eps / 2 * float(values.abs().max())
    bound = 1.1 * (relative * (weights @ values.abs()) + absolute)
    assert ((found.out.double() - weights @ values).abs() <= bound).all()
    lse = scores.logsumexp(-1)
    empty = lse.isneginf()
    assert torch.equal(found.lse.isneginf(), empty.expand_as(found.lse))
    error = (found.lse.double() - lse).abs().masked_fill(empty, 0)
    rounding = launches * (2 * (keys + 8) * 2**-24 + lse.masked_fill(empty, 0).abs() * 2**-22)
    assert (error <= e + rounding).all()


WINDOWS = {
    "window": (3, 17, 0),
    "no-sink": (0, 70, 0),
    "long-sink": (90, 5, 0),
    "tri": (5, 9, 21),
    "all-dense": (0, 1, 999),
}
GRIDS = {
    "hv": Grid(3, 9, 5, 220, 7),
    "v-long-window": Grid(0, 70, 0, 300, 3, horizontal=False),
    "h": Grid(20, 5, 31, 90, 13, vertical=False),
    "s": Grid(2, 9, 4, 250, 28, horizontal=False, vertical=False, slash=True),
    "hvs": Grid(2, 11, 9, 100, 5, slash=True),
    "stride-beyond": Grid(4, 8, 4, 60, 80, slash=True),
    "stride-far-beyond": Grid(4, 8, 4, 60, 2**33, slash=True),
    "stride-1": Grid(0, 1, 0, 300, 1, horizontal=False),
}
TILES = {63: Tile(16, 16), 111: Tile(32, 64), 257: Tile(64, 32)}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("n", TILES)
def test_windows_are_their_rule(name: str, n: int) -> None:
    sink, local, tail = WINDOWS[name]
    q, k, v = qkv(n)
    found = a_shape(q, k, v, sink=sink, local=local, tail=tail, tile=TILES[n])
    check(found, q, k, v, a_shape_visible(every(n), n, sink=sink, local=local, tail=tail))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [63, 111])
def test_grids_are_their_rule(name: str, n: int) -> None:
    grid = GRIDS[name]
    q, k, v = qkv(n)
    phase = torch.tensor([[0, grid.stride - 1]])
    found = grid_attention(q, k, v, grid, phase, tile=TILES[n])
    check(found, q, k, v, grid_visible(grid, phase, every(n), n), launches=1 + grid.slash)


@pytest.mark.parametrize(("n", "block"), [(63, 64), (111, 16), (257, 64), (257, 32), (200, 8)])
def test_indices_are_their_rule(n: int, block: int) -> None:
    q, k, v = qkv(n)
    index = index_of(q, k, block)
    check(vertical_slash(q, k, v, index, tile=Tile(64, 64)), q, k, v, index.visible(every(n)))


def mix(q: Tensor, k: Tensor, block: int = 64) -> tuple[Table, Tensor]:
    """Six heads, each of a kind of its own, and what they may see: ``[B, 6, n, n]``."""
    batch, n = len(q), q.shape[2]
    index = index_of(q, k, block)
    index = Index(index.columns[:, 2:4], index.diagonals[:, 2:4], block, n)
    grid, other = Grid(3, 9, 5, 90, 7), Grid(3, 9, 5, 90, 11)
    strides = torch.tensor([[7, 11]]).expand(batch, -1)
    phase = torch.tensor([[2, 10]]).expand(batch, -1)
    lines = pattern(grid, phase, strides, (7, 11))
    parts = [(every(2), lines), (torch.tensor([3, 5]), Pattern(index=index)), (torch.tensor([4]), Pattern(2, 13))]
    allow = torch.ones(batch, 6, n, n, dtype=torch.bool).tril()
    allow[:, 0], allow[:, 1] = (grid_visible(g, phase, every(n), n)[:, i] for i, g in enumerate((grid, other)))
    allow[:, 3], allow[:, 5] = index.visible(every(n)).unbind(1)
    allow[:, 4] = a_shape_visible(every(n), n, sink=2, local=13)
    return Table.of([*parts, (torch.tensor([2]), Pattern(local=n))], batch, n, q.device), allow


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_head_dimensions_and_dtypes_of_a_mix_of_heads_in_one_launch(dim: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(63, 6, 2, dim, dtype)
    table, allow = mix(q, k)
    check(attended(q, k, v, table), q, k, v, allow)


def test_prompts_of_a_batch_have_their_own_index_and_heads_may_lie_before_tokens() -> None:
    q, k, v = (torch.cat([x, x.flip(2)]).contiguous() for x in qkv(111, 6, 3))
    table, allow = mix(q, k, 32)
    assert not torch.equal(allow[0, 3], allow[1, 3])
    check(attended(q, k, v, table, tile=Tile(64, 32)), q, k, v, allow)


@pytest.mark.parametrize("block", [64, 16])
def test_each_allowed_pair_counts_once_and_no_other(block: int) -> None:
    """With queries of zero every key weighs the same, and values that mark a key show who has seen it, and how often."""
    n = 111
    random = qkv(n, 6, 2)
    table, allow = mix(*random[:2], block)
    q, k = torch.zeros(1, 6, n, 128), torch.randn(1, 1, n, 128)
    v = torch.nn.functional.pad(torch.eye(n), (0, 128 - n))[None, None]
    out, lse = attended(q, k, v, table, tile=Tile(64, 32))
    seen = allow.sum(-1)
    # One division, one product, all counts below 2**24.
    torch.testing.assert_close((out * seen[..., None])[..., :n], allow.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, seen.log(), rtol=1e-6, atol=1e-6)


def test_diagonals_of_a_grid_count_each_pair_once() -> None:
    n = 111
    grid, phase = GRIDS["hvs"], torch.tensor([[3]])
    allow = grid_visible(grid, phase, every(n), n)
    v = torch.nn.functional.pad(torch.eye(n), (0, 128 - n))[None, None]
    out = grid_attention(torch.zeros(1, 1, n, 128), torch.randn(1, 1, n, 128), v, grid, phase, tile=Tile(64, 32)).out
    torch.testing.assert_close((out * allow.sum(-1)[..., None])[..., :n], allow.float(), rtol=0, atol=2e-6)


def test_work_grows_with_the_window_and_not_with_the_prompt(request: pytest.FixtureRequest) -> None:
    """Every further 64 rows ask for as many products; vertical lines for one more pair of products each 32 lines."""
    count = request.getfixturevalue("dots")
    asked = []
    for n in (192, 256, 320):
        q, k, v = qkv(n, 1)
        count[0] = 0
        a_shape(q, k, v, sink=32, local=40, tile=Tile(64, 32))
        asked.append(count[0])
    assert asked[1] - asked[0] == asked[2] - asked[1] == 2 * (1 + 4)  # the sink, and 40 + 63 keys from an odd one on


def test_some_keys_behind_a_boundary() -> None:
    """The parts that boundaries are joined of: rows at the end, a rectangle, and columns between runs of text."""
    q, k, v = qkv(111)
    later = q[:, :, 70:]
    check(dense(later, k, v, causal=True), later, k, v, (every(111) <= every(111)[70:, None])[None, None])
    before = (k[:, :, :70], v[:, :, :70])
    check(dense(later, *before, causal=False), later, *before, torch.ones(1, 1, 41, 70, dtype=torch.bool))
    columns = torch.tensor([[[3, 9, 40, 75, 76, 110], [80, 81, 90, 91, 108, 109]]])
    allow = torch.zeros(1, 2, 41, 111, dtype=torch.bool)
    allow.scatter_(3, columns[:, :, None].expand(-1, -1, 41, -1), True)
    allow &= every(111) <= every(111)[70:, None]
    assert not allow[0, 1, :10].any()  # rows without a key: zeros and -inf
    check(behind_columns(later, k, v, columns, 70, tile=Tile(64, 32)), later, k, v, allow)


@pytest.mark.parametrize("rows", [8, 70])
@pytest.mark.parametrize(("lines", "stride"), [("s", 3), ("vs", 7), ("v", 1)])
def test_lines_of_the_last_rows_alone_are_those_of_the_whole_prompt(lines: str, stride: int, rows: int) -> None:
    """At a stride of 3 a residue's last 24 rows lie in two tiles."""
    n, slash, vertical = 257, "s" in lines, "v" in lines
    grid = Grid(3, 9, 5, n, stride, horizontal=False, vertical=vertical, slash=slash)
    phase = torch.tensor([[0, stride - 1]])
    q, k, v = qkv(n)
    table = Table.of([(every(2), pattern(grid, phase))], 1, rows, q.device, shift=n - rows)
    found = attended(q[:, :, -rows:], k, v, table, tile=Tile(64, 32))
    check(found, q[:, :, -rows:], k, v, grid_visible(grid, phase, every(n)[-rows:], n), launches=1 + slash)


def test_what_is_no_number_is_not_hidden() -> None:
    q, k, v = qkv(63)
    k = k.clone()
    k[:, :, 40] = float("nan")
    out, lse = a_shape(q, k, v, sink=0, local=9)
    assert bool(out[:, :, 40:49].isnan().all())
    assert bool(lse[:, :, 40:49].isnan().all())
    assert out[:, :, :40].isfinite().all()


def test_an_index_that_points_outside_names_a_column_twice_or_lacks_its_diagonal_is_handled() -> None:
    n = 111
    q, k, v = qkv(n)
    columns = torch.tensor([[[-(2**40), 3, 3, 40, 200, 999], [0, 1, 2, 110, 111, 2**40]]])
    index = Index(columns, torch.zeros(1, 2, 2, dtype=torch.bool), 64, n)
    allow = torch.zeros(1, 2, n, n, dtype=torch.bool)
    for head, kept in enumerate(((3, 40), (0, 1, 2, 110))):
        allow[:, head, :, list(kept)] = True
    allow |= every(n) // 64 == every(n)[:, None] // 64  # the main block diagonal, kept whatever the index says
    allow &= every(n) <= every(n)[:, None]
    check(vertical_slash(q, k, v, index, tile=Tile(64, 32)), q, k, v, allow)
    nothing = Index(torch.empty(1, 2, 0, dtype=torch.long), index.diagonals, 64, n)
    found = vertical_slash(q, k, v, nothing, tile=Tile(64, 32))
    check(found, q, k, v, (every(n) // 64 == every(n)[:, None] // 64) & (every(n) <= every(n)[:, None]))


def test_heads_that_see_nothing_are_zeros() -> None:
    q, k, v = qkv(63)
    table = Table.of([(every(2), Pattern())], 1, 63, q.device)
    out, lse = attended(q, k, v, table)
    assert bool((out == 0).all())
    assert bool(lse.isneginf().all())


def test_only_the_row_blocks_that_are_asked_for_are_computed() -> None:
    n = 257
    q, k, v = qkv(n)
    index = index_of(q, k, 32)
    whole = vertical_slash(q, k, v, index, tile=Tile(64, 32))
    some = vertical_slash(q, k, v, index, row_blocks=torch.tensor([3, 8]), tile=Tile(64, 32))
    held = (every(n) // 64 == 1) | (every(n) >= 256)
    assert torch.equal(some.out[:, :, held], whole.out[:, :, held])
    assert bool((some.out[:, :, ~held] == 0).all())
    assert bool(some.lse[:, :, ~held].isneginf().all())


@pytest.mark.parametrize("row", [0, 16, 62])
def test_what_comes_later_cannot_leak(row: int) -> None:
    """Inside a tile later keys are loaded and masked: NaN keys and values of any finite size leave earlier rows alone."""
    q, k, v = qkv(63, 6, 2)
    table, _ = mix(q, k)
    before = attended(q, k, v, table).out
    k, v = k.clone(), v.clone()
    k[:, :, row + 1 :], v[:, :, row + 1 :] = float("nan"), 3e38
    assert torch.equal(attended(q, k, v, table).out[:, :, : row + 1], before[:, :, : row + 1])


def test_large_scores_of_either_sign_are_no_nan() -> None:
    """A public kernel began its maximum at zero, and strongly negative scores came to 0 / 0."""
    q, k, v = qkv(63, 6, 2)
    table, _ = mix(q, k)
    for q_, k_ in ((q * 1e4, k * 1e4), (q * 0 - 100, k * 0 + 100)):
        out = attended(q_, k_, v, table).out
        assert out.isfinite().all()
        assert out.abs().max() <= v[v.isfinite()].abs().max() * (1 + 2**-20)  # an average


def test_offsets_pass_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2**31 / 40 numbers apart, in memory that is promised and hardly touched: 32 bits would point outside of it."""
    n, apart, dim = 63, 2**31 // 40, 16
    # Without this the interpreter ends by copying every storage onto itself, which touches all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which the module names from Python 3.13 on
    memory = mmap.mmap(-1, 2 * n * apart, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    numbers = torch.frombuffer(memory, dtype=torch.float16)
    near = qkv(n, 1, 1, dim, torch.float16)
    q, k, v = (numbers.as_strided((1, 1, n, dim), (0, 0, apart, 1), 256 * i) for i in range(3))
    for x, original in zip((q, k, v), near, strict=True):
        x.copy_(original)
    grid, phase = Grid(3, 9, 5, 60, 7, slash=True), torch.tensor([[2]])
    index = index_of(*near[:2])
    here = [grid_attention(*near, grid, phase).out, vertical_slash(*near, index).out]
    empty = torch.empty
    # The kernel's own output is no exception.
    monkeypatch.setattr(
        torch,
        "empty",
        lambda size, **options: (
            numbers.as_strided(size, (0, apart, 0, 1), 1024) if len(size) == 4 else empty(size, **options)
        ),
    )
    assert torch.equal(grid_attention(q, k, v, grid, phase).out, here[0])
    assert torch.equal(vertical_slash(q, k, v, index).out, here[1])


# A layer of MMInference: what the CPU computes is what one launch does.

TEXT, GRID = Intra("vs", columns=4, slashes=4), Intra("grid", sink=3, local=6)
LAYERS = {
    "mix": [
        Head(GRID, TEXT),
        Head(Intra("grid", sink=3, local=6, stride="frame", slash=True), TEXT),
        Head(Intra("vs", columns=9, slashes=6), TEXT),
        Head(Intra("tri", sink=4, local=20), TEXT),
    ],
    "some-with-boundaries": [Head(GRID, TEXT, "q"), Head(Intra("a_shape", sink=4, local=20), TEXT)] * 2,
    "q-dense-text": [Head(Intra("vs", columns=9, slashes=6), Intra("dense"), "q")] * 2,
    "2d": [Head(GRID, TEXT, "2d"), Head(GRID, Intra("dense"), "2d")],
}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fused, mm_attention, mm_boundary, a_shape_op, grid_op, vertical_slash_op):
        monkeypatch.setattr(module, "preferred", lambda device: True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_what_the_plain_path_computes(name: str, request: pytest.FixtureRequest) -> None:
    heads = LAYERS[name]
    runs = (Run(False, 0, 10), Run(True, 10, 80), Run(False, 80, 90), Run(True, 90, 120), Run(False, 120, 140))
    scene = Scene(runs, 13, 5)
    q, k, v = (x.contiguous() for x in qkv(140, len(heads), 2 if name != "2d" else 1))
    plain, counted = mm_attention.attention(q, k, v, heads, scene)
    request.getfixturevalue("on_a_gpu")
    ours, did = mm_attention.attention(q, k, v, heads, scene)
    # float32 rounding of averages of at most 140 values near one, joined at most four times.
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert did.allowed == counted.allowed
    assert sorted(did.strides) == sorted(counted.strides)
    assert not did.tally.written
    recalls = [torch.cat(each.recalls).sort().values for each in (did, counted)]
    torch.testing.assert_close(recalls[0], recalls[1], rtol=0, atol=1e-6)
    if name == "mix":
        for rows in pairwise((0, 50, 140)):
            known = [dict(zip(n.tolist(), rule(every(140)[slice(*rows)])[0], strict=True)) for n, rule in did.rules]
            merged = {head: seen for part in known for head, seen in part.items()}
            theirs = [
                dict(zip(n.tolist(), rule(every(140)[slice(*rows)])[0], strict=True)) for n, rule in counted.rules
            ]
            assert all(torch.equal(merged[head], seen) for part in theirs for head, seen in part.items())


def test_the_tuned_kernel_names_its_arguments() -> None:
    """Tuning keys on names; every configuration has an order of tiles; and timings are kept on disk."""
    from vlmbench.kernels.sparse_lines import fused_kernel

    with open(fused_kernel.__file__, encoding="utf-8") as file:
        assert "cache_results=True" in file.read()
    for config in fused_kernel.SHORT + fused_kernel.WIDE:
        assert config.kwargs["BM"] in fused_kernel.TUNED_ROWS
        assert config.kwargs["BN"] <= 64  # a block of an index is no less than a tile's keys
    for dtype, vs in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
        chosen = fused_kernel._of_this_call(fused_kernel.SHORT, {"q": torch.zeros(1, dtype=dtype)}, VS=vs)
        assert chosen
        assert not vs or {config.kwargs["BM"] for config in chosen} == {64}
        assert (chosen == fused_kernel.WIDE) == (dtype == torch.float32)
    names = inspect.signature(fused_kernel.lines_fwd_kernel.fn).parameters
    assert {"q", *fused_kernel.lines_fwd.keys} <= set(names)
