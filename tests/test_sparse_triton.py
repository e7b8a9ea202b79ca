"""Sparse patterns on a GPU: what the dispatcher does without one, the kernel's tables, and true shapes on CUDA.

The kernels themselves are run by `interpreted_sparse_lines.py` under Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.on_triton import CPU, check_rows, qkv, run_interpreted, run_without_triton
from vlmbench import mm_attention, mm_boundary, mm_fused, mm_told
from vlmbench.kernels import a_shape as a_shape_op
from vlmbench.kernels import grid as grid_op
from vlmbench.kernels import vertical_slash as vertical_slash_op
from vlmbench.kernels.block_attention import SlowPath
from vlmbench.kernels.calls import Attended, Tally, last_weights
from vlmbench.kernels.grid import Grid, find_lines
from vlmbench.kernels.grid.fused import pattern
from vlmbench.kernels.last_queries import Sums, reference
from vlmbench.kernels.sparse_lines import Pattern, Refused, Table, attended, fused
from vlmbench.kernels.vertical_slash import Index, make_index
from vlmbench.mm_patterns import Head, Intra, Run, Scene
from vlmbench.trace import Trace

TEXT = Intra("vs", columns=4, slashes=4)


def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted("interpreted_sparse_lines.py")


def test_importing_needs_no_triton() -> None:
    run_without_triton(
        "from vlmbench.kernels import a_shape, grid, last_queries, vertical_slash, sparse_lines\n"
        "from vlmbench import mm_attention, mm_fused"
    )


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU had nothing of its own: the kernel refuses it, in its words."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in (fused, mm_attention, mm_boundary, a_shape_op, grid_op, vertical_slash_op):
        monkeypatch.setattr(module, "preferred", lambda device: True)


def layer(head: Head, n: int = 90) -> tuple[Tensor, mm_attention.Layer]:
    scene = Scene((Run(False, 0, 10), Run(True, 10, 70), Run(False, 70, n)), 6, 3)
    return mm_attention.attention(*qkv(n), [head] * 2, scene)


@pytest.mark.parametrize("inter", ["none", "q", "2d"])
@pytest.mark.parametrize("kind", ["grid", "vs", "tri"])
def test_what_the_kernel_refuses_takes_the_plain_path_and_says_so_or_fails(
    kind: Any, inter: Any, request: pytest.FixtureRequest
) -> None:
    head = Head(Intra(kind, sink=2, local=8, columns=5, slashes=5), TEXT, inter)
    plain, _ = layer(head)
    request.getfixturevalue("on_a_gpu")
    with pytest.warns(SlowPath, match="masked reference stands in"):
        out, _ = layer(head)
    assert torch.equal(out, plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*masked reference stands in")  # as --strict does
        with pytest.raises(SlowPath, match="as slow as dense"):
            layer(head)


def test_refusals_are_sentences_with_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(70)
    table = Table.of([(torch.arange(2), Pattern(local=4))], 1, 70, CPU)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Refused, match=r"it needs a GPU|triton is not installed"):
        attended(q, k, v, table)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # past the question of the device; nothing is launched here
    with pytest.raises(Refused, match="float64, float64, float64"):
        attended(q.double(), k.double(), v.double(), table)
    with pytest.raises(Refused, match=r"scale of -1\.0"):
        attended(q, k, v, table, scale=-1.0)
    with pytest.raises(ValueError, match=r"\[1, 2, 70\]; q has \[1, 2, 69\]"):
        attended(q[:, :, :-1], k, v, table)
    with pytest.raises(ValueError, match="heads that divide"):
        attended(q[:, :1], k, v, table)


def test_patterns_that_no_kernel_could_be_right_for_are_refused() -> None:
    index = Index(torch.zeros(1, 2, 1, dtype=torch.long), torch.ones(1, 2, 2, dtype=torch.bool), 48, 70)
    other = Index(index.columns, torch.ones(1, 2, 2, dtype=torch.bool), 64, 70)
    fine = Index(index.columns, torch.ones(1, 2, 9, dtype=torch.bool), 8, 70)
    every = torch.arange(2)
    for patterns, words in (
        ([(every, Pattern(index=index))], "divide 64, not be 48"),
        (
            [(every, Pattern(index=Index(index.columns, index.diagonals[..., :1], 64, 70)))],
            "1 block diagonals, too few",
        ),
        ([(every, Pattern(index=Index(index.columns, index.diagonals, 64, 80)))], "index is for 80 tokens"),
        ([(every, Pattern(index=other)), (every + 2, Pattern(index=fine))], r"one size, not \[8, 64\]"),
        ([(every, Pattern(4, 3, 70, 2, 70, (7,), vertical=True))], "lines from 2 on need a sink before them"),
        ([(every, Pattern(0, 0, 70, 2, 70, (7,), vertical=True))], "a window of at least 1"),
        ([(every, Pattern(0, 1, 70, 2, 70, (0,), vertical=True))], "stride must be at least 1, not 0"),
        ([(every, Pattern(0, 1, 70, 2, 60, (7,), vertical=True))], "lines that end at 60 need rows .* not 70"),
        ([(every, Pattern(0, 1, index=other))], "would count twice"),
    ):
        with pytest.raises(ValueError, match=words):
            Table.of(patterns, 1, 70, CPU)
    with pytest.raises(ValueError, match="all rows from 0 on, not from 5"):
        Table.of([(every, Pattern(0, 1, 70, 2, 70, (7,), horizontal=True))], 1, 65, CPU, shift=5)


def test_launches_of_other_kinds_of_heads_are_tuned_apart() -> None:
    """Triton compiles anew for an argument that is 1 or that 16 divides; the same program is meant."""
    window, lines = Pattern(2, 9), Pattern(2, 9, 70, 2, 70, (7,), vertical=True)
    index = Pattern(index=Index(torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1, 2, dtype=torch.bool), 64, 70))
    mixes = [[window], [lines], [index], [window, lines], [window, index], [lines, index], [window, lines, index]]
    keys = set()
    for mix in mixes:
        table = Table.of([(torch.tensor([i]), each) for i, each in enumerate(mix)], 1, 70, CPU)
        assert table.kinds > 1
        assert table.kinds % 16
        keys.add((table.blocks is not None, table.kinds))
    assert len(keys) == len(mixes)


def test_indices_and_tables_are_made_without_asking_the_device() -> None:
    """Tensors without numbers cannot be asked: whatever waits for the device would fail."""
    q, k, _ = (x.to("meta") for x in qkv(300, 4, 2))
    weights = last_weights(q[:, :, -64:], k, scale=0.25, tally=Tally())
    stride, phase, _ = find_lines(weights, (7, 28), start=10, stop=280)
    index = make_index(weights, columns=9, slashes=9)
    lines = pattern(Grid(4, 9, 10, 280, 1), phase, stride, (7, 28))
    parts = [(torch.arange(4), lines), (torch.arange(4, 8), Pattern(index=index))]
    table = Table.of(parts, 1, 300, q.device)
    assert table.heads.shape == (1, 8, 12)
    assert table.lines == -(-270 // 7)


def test_what_is_beyond_the_prompt_is_cut_to_it() -> None:
    """The kernel multiplies strides and adds positions in 32 bits."""
    far = 2**40
    grid = Grid(3, far, 5, far, far, slash=True)
    table = Table.of([(torch.arange(1), pattern(grid, torch.tensor([[far - 1]])))], 1, 70, CPU)
    assert table.heads.tolist() == [[[3, 70, 70, 5, 70, 70, 70, 7, -1, 0, 0, 0]]]
    assert table.slashes == ((65, 70),)
    index = Index(torch.tensor([[[-far, -1, 0, far]]]), torch.ones(1, 1, 2, dtype=torch.bool), 64, 70)
    blocks = Table.of([(torch.arange(1), Pattern(index=index))], 1, 70, CPU).blocks
    assert blocks is not None
    assert blocks.columns.tolist() == [[-1, -1, 0, 2**31 - 1]]


@pytest.fixture
def stand_ins(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plain path computes in place of the kernels, so that all around them is run without Triton."""

    def log_sum_exp(q: Tensor, k: Tensor, heads: Tensor, *, scale: float) -> Tensor:
        keys = k[:, heads // (q.shape[1] // k.shape[1])]
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
        return (scale * q[:, heads] @ keys.transpose(-1, -2)).masked_fill(later, float("-inf")).logsumexp(-1)

    def sums(q: Tensor, k: Tensor, heads: Tensor, lse: Tensor, *, diagonals: bool, scale: float) -> Sums:
        keys = k[:, heads // (q.shape[1] // k.shape[1])]
        found = reference.sums(last_weights(q[:, heads], keys, scale=scale, tally=Tally()))
        return found if diagonals else Sums(found.columns, found.diagonals[..., :0])

    def attended(q: Tensor, k: Tensor, v: Tensor, table: Table, *, scale: float) -> Attended:
        assert table.rows == q.shape[2]
        return Attended(torch.empty_like(q), torch.zeros_like(q[..., 0]))

    monkeypatch.setattr(mm_fused.last_queries, "log_sum_exp", log_sum_exp)
    monkeypatch.setattr(mm_fused.last_queries, "sums", sums)
    monkeypatch.setattr(mm_fused, "attended", attended)


MIX = [
    Head(Intra("grid", sink=2, local=8, slash=True), TEXT),
    Head(Intra("vs", columns=5, slashes=5), TEXT),
    Head(Intra("tri", sink=2, local=8), TEXT),
    Head(Intra("dense"), TEXT),
]
SCENE = Scene((Run(False, 0, 10), Run(True, 10, 270), Run(False, 270, 300)), 6, 3)


def test_a_layer_is_launched_without_asking_the_device(stand_ins: None) -> None:
    """As above, and whatever is left to count is not counted yet."""
    q, k, v = (x.to("meta") for x in qkv(300, 4, 2))
    out, did = mm_attention.attention(q, k, v, MIX, SCENE, settle=False)
    assert out.shape == q.shape
    assert did.tally.scores == 2 * scores_of(64) + scores_of(8)  # of an index, or of the recall alone
    assert (did.allowed, did.strides, did.recalls, did.rules, len(did.later)) == (0, [], [], [], 1)


def scores_of(rows: int, n: int = 300) -> int:
    return rows * (n - rows) + rows * (rows + 1) // 2


def test_what_is_left_to_count_holds_neither_keys_nor_weights(stand_ins: None) -> None:
    """All layers of a prompt of a million tokens wait for the trace to be read: a few numbers a head, and the indices."""
    n = 300
    q, k, v = qkv(n, 4, 2)
    _, did = mm_attention.attention(q, k, v, MIX, SCENE, settle=False)
    waiting: list[Any] = [did.later]
    held: dict[int, Tensor] = {}
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, ModuleType | type) or inspect.isbuiltin(each):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            held[each.untyped_storage().data_ptr()] = each
        waiting += closed_over(each) if inspect.isfunction(each) else gc.get_referents(each)
    assert held
    # A byte a block diagonal and eight a column; all else is numbers of a head or of the recall's rows.
    most = max(5 * 8, -(-n // 8), 4 * mm_attention.PROBED * 4)
    assert max(x.untyped_storage().nbytes() for x in held.values()) <= 4 * most
    assert did.settle().allowed
    assert did.settle().recalls


def closed_over(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def test_numbers_are_asked_for_when_the_trace_is_read_and_once(stand_ins: None) -> None:
    trace, times = Trace(), []
    q, k, v = qkv(300, 4, 2)
    for layer_number in (0, 1):
        _, did = mm_attention.attention(q, k, v, MIX, SCENE, settle=False)
        did.later.append(lambda: times.append(1))
        mm_told.note(trace, SCENE, layer_number, 4, did)
    assert not trace.facts
    assert not times
    assert trace.applied
    read = trace.to_json()
    assert read == trace.to_json()
    assert len(times) == 2
    assert sorted(read["density"]) == sorted(read["recall"]) == ["0", "1"]
    assert sum(read["strides"].values()) == 2
    plain = Trace()
    for layer_number in (0, 1):
        _, did = mm_attention.attention(q, k, v, MIX, SCENE)
        mm_told.note(plain, SCENE, layer_number, 4, did)
    assert plain.to_json() == read


def test_what_a_prefill_left_is_counted_outside_of_its_inference_mode(stand_ins: None) -> None:
    """As the engine reads a trace: tensors of the prefill may not be written to any more."""
    with torch.inference_mode():
        _, did = mm_attention.attention(*qkv(300, 4, 2), MIX, SCENE, settle=False)
        _, right = mm_attention.attention(*qkv(300, 4, 2), MIX, SCENE)
    assert not torch.is_inference_mode_enabled()
    assert did.settle().allowed == right.allowed
    assert torch.equal(torch.cat(did.recalls), torch.cat(right.recalls))
    for _, rule in did.rules:
        assert rule(torch.arange(3)).any()


READINGS: dict[str, Callable[[Trace], Any]] = {
    "applied": lambda trace: trace.applied,
    "reason": lambda trace: trace.reason,
    "idle": lambda trace: trace.idle,
    "json": Trace.to_json,
    "settle": Trace.settle,
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_what_waits_is_told_through_any_reading_and_forgotten_with_its_sample(read: Callable[[Trace], Any]) -> None:
    whole = Trace()
    part = whole.part("one")
    part.later("mine", lambda: part.inactive("nothing to do"))
    part.later("mine", lambda: part.facts.update(x=1))  # in its place
    read(whole)
    assert whole.facts == {"x": 1}
    assert part.applied
    part.later("mine", lambda: part.facts.update(x=2))
    whole.reset("next")
    read(whole)
    assert not whole.facts


@settings(max_examples=40)
@given(st.integers(1, 400), st.sampled_from([8, 16, 32, 64]), st.integers(0, 99))
def test_the_index_of_tiles_holds_just_what_some_pair_of_them_needs(n: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    diagonals = torch.rand(1, 1, -(-n // block), generator=generator) < 0.15
    columns = torch.randint(0, n, (1, 1, 7), generator=generator).sort().values
    blocks = Table.of([(torch.arange(1), Pattern(index=Index(columns, diagonals, block, n)))], 1, n, CPU).blocks
    assert blocks is not None
    diagonals[..., 0] = True
    i = torch.arange(n)
    kept = diagonals[0, 0][(i[:, None] // block - i // block).clamp(min=0)] & (i <= i[:, None])
    for tile in range(-(-n // 64)):
        listed = blocks.diagonals[0, : blocks.n_diagonals[0, tile]]
        rows = slice(tile * 64, (tile + 1) * 64)
        held = [tile - d for d in range(tile + 1) if d == 0 or kept[rows, (tile - d) * 64 : (tile - d + 1) * 64].any()]
        # A ragged last tile may lack the very rows that a diagonal of small blocks needs.
        assert set(held) <= {tile - d for d in listed.tolist()}
        if n % 64 == 0 and block == 64:
            assert held == [tile - d for d in listed.tolist()]
        single = blocks.columns[0, : blocks.n_columns[0, tile]]
        assert set(single[single >= 0].tolist()) == {
            c for c in columns.flatten().tolist() if c < min(tile * 64 + 64, n)
        }


def test_tiles_are_launched_longest_first() -> None:
    order = fused._order(200, 64, 70, CPU).tolist()
    assert order == [-2, -1, 4, 3, 2, 1, 0]


# On a GPU. The shape is gpu-mm of the fixed workloads at 16k tokens, and one of a million for addresses.


def heads_of_the_mix(count: int, slash: bool = False) -> list[Head]:
    few = round(count / 5)
    grid, vs, window = Intra("grid", slash=slash), Intra("vs"), Intra("a_shape", local=4096)
    return [Head(intra, TEXT) for intra in [grid] * (count - 2 * few) + [vs] * few + [window] * few]


def prompt(tokens: int, frame: int = 256) -> Scene:
    stop = 14 + (tokens - 74) // frame * frame
    return Scene((Run(False, 0, 14), Run(True, 14, stop), Run(False, stop, tokens)), frame, 16)


# Their compiling is most of what they take, about two seconds a kernel: `bench_gpu` has 100 s for all files, on eight cores.


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "slash"), [(16_384, False), (16_384, True), (24_000, True)])
def test_true_shape_on_cuda(tokens: int, slash: bool) -> None:
    """Below 20 240 tokens blocks of an index are smaller than tiles."""
    q, k, v = qkv(tokens, 28, 4, 128, torch.bfloat16, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        out, did = mm_attention.attention(q, k, v, heads_of_the_mix(28, slash), prompt(tokens))
    assert not did.tally.written

    def visible(rows: Tensor) -> Tensor:
        found = {n: s for numbers, rule in did.rules for n, s in zip(numbers.tolist(), rule(rows)[0], strict=True)}
        return torch.stack([found[n] for n in range(28)])

    check_rows(out, q, k, v, visible, launches=1 + slash)


def check_tiling(dim: int, dtype: torch.dtype, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is written: outputs are NaN before."""
    n, empty = 3001, torch.empty
    q, k, v = qkv(n, 6, 2, dim, dtype, "cuda")
    grid, phase = Grid(20, 300, 33, 2900, 37), torch.tensor([[0, 1, 5, 9, 20, 36]], device="cuda")
    table = Table.of([(torch.arange(6), pattern(grid, phase))], 1, n, q.device)
    tile = fused.Tile(config.kwargs["BM"], config.kwargs["BN"], config.num_warps, config.num_stages)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
        try:
            out = attended(q, k, v, table, tile=tile).out
        except Refused as refused:
            pytest.skip(str(refused))  # more shared memory than this card has
    check_rows(out, q, k, v, lambda rows: grid_op.visible(grid, phase, rows, n)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(dim, torch.bfloat16) for dim in (64, 72, 80, 96)]
    + [(dim, dtype) for dim in (80, 128) for dtype in (torch.float16, torch.float32)],
    ids=str,
)
def test_head_dimensions_on_cuda(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmbench.kernels.sparse_lines import fused_kernel

    configs = fused_kernel.WIDE if dtype == torch.float32 else fused_kernel.SHORT
    check_tiling(dim, dtype, configs[-2], monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(6))
def test_every_tiling_on_cuda(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmbench.kernels.sparse_lines import fused_kernel

    assert len(fused_kernel.SHORT) == 6
    check_tiling(128, torch.bfloat16, fused_kernel.SHORT[number], monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("inter", ["none", "q", "2d"])
@pytest.mark.parametrize("dim", [64, 256])
def test_boundaries_on_cuda_are_what_the_cpu_computes(dim: int, inter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 256 are refused, and go the plain way there."""
    monkeypatch.setattr(fused, "interpreted", lambda: True)  # a tiling that needs no tuning
    scene = Scene((Run(False, 0, 10), Run(True, 10, 70), Run(False, 70, 90)), 6, 3)
    heads = [Head(Intra(kind, sink=2, local=8, columns=5, slashes=5), TEXT, inter) for kind in ("grid", "vs")]
    # Written out, scores are rounded to the tensors' dtype.
    numbers = qkv(90, dim=dim, dtype=torch.float32 if dim == 256 else torch.bfloat16)
    q, k, v = (x.float() for x in numbers)
    plain, counted = mm_attention.attention(q, k, v, heads, scene)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if dim == 256 else "error", SlowPath)
        q, k, v = (x.cuda() for x in numbers)
        out, did = mm_attention.attention(q, k, v, heads, scene)
    assert did.tally.written is (dim == 256)
    assert did.allowed == counted.allowed
    # A few roundings of bfloat16 on averages of values below four; another set of keys would be off by tenths.
    torch.testing.assert_close(out.cpu().float(), plain, rtol=0, atol=0.05)


@pytest.mark.gpu
def test_a_million_tokens_are_addressed_on_cuda() -> None:
    """Three query heads and a key head in room for 28: offsets pass 2**31."""
    n, dim = 2**20, 128
    room = torch.empty(1, n, 28, dim, dtype=torch.bfloat16, device="cuda")  # 3.8 G numbers
    q, k, v = (room[:, :, i : i + size].transpose(1, 2) for i, size in ((0, 3), (26, 1), (27, 1)))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, dtype=torch.bfloat16, device="cuda"))
    heads = [Head(Intra("grid"), TEXT), Head(Intra("vs"), TEXT), Head(Intra("a_shape", local=4096), TEXT)]
    out, did = mm_attention.attention(q, k, v, heads, prompt(n), probe=False)
    rows = torch.tensor([n // 2 + 77, n - 1], device="cuda")
    for numbers, rule in did.rules:
        for head, seen in zip(numbers.tolist(), rule(rows)[0], strict=True):
            scores = (q[0, head, rows].double() @ k[0, 0].double().T * dim**-0.5).masked_fill(~seen, float("-inf"))
            want = scores.softmax(-1) @ v[0, 0].double()
            # bfloat16's rounding of weights and output; averages of values near one.
            torch.testing.assert_close(out[0, head, rows].double(), want, rtol=2**-7, atol=2**-9)
