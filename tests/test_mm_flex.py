"""MMInference through FlexAttention: the same pairs as ours, from tables that say neither too much nor too little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vlmbench import mm_flex
from vlmbench.bench import Shape, make_methods
from vlmbench.kernels.a_shape import visible as a_shape_visible
from vlmbench.kernels.calls import reference
from vlmbench.kernels.grid import Grid
from vlmbench.kernels.grid import visible as grid_visible
from vlmbench.kernels.vertical_slash import Index
from vlmbench.mm_patterns import Scene

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SHAPE = Shape(6, 20, 10, 2, 32)  # 194 tokens; the mix has six, two and two heads of its kinds
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled the call still has every rule traced, which takes longer than all there is to compute here."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def asked(spec: str, seed: int = 0) -> tuple[Any, Any, Scene, tuple[Tensor, Tensor, Tensor]]:
    """The method, its prompt and scene, and planted queries, keys and values as a model hands them over."""
    (method,) = make_methods([f"mminference:{spec}"])
    prompt, generator = SHAPE.prompt(), torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, SHAPE.tokens, h, 32, generator=generator).transpose(1, 2) for h in (10, 2, 2))
    method.plant(prompt, q, k)  # type: ignore[attr-defined]
    return method, prompt, Scene.of(prompt.layout), (q, k, v)


@pytest.mark.parametrize(
    "spec",
    [
        "pattern=a_shape,sink=3,local=20",
        "pattern=tri,sink=3,local=20",
        "pattern=vs,columns=9,slashes=30",
        "pattern=grid,local=7",
        "pattern=grid,local=7,lines=hvs,stride=5,phase=2",
        "pattern=grid,local=3,lines=s,stride=3",
        "pattern=mix",
        "pattern=dense",
    ],
)
def test_it_attends_to_the_pairs_that_ours_does(spec: str) -> None:
    method, prompt, scene, (q, k, v) = asked(spec)
    rule = method.rule(prompt, q, k)
    out = mm_flex.attention(q, k, v, method.heads(scene, 0, 10), scene)
    right = reference(q, k, v, rule.visible(torch.arange(SHAPE.tokens)))
    # float32 rounding of averages over values near one, joined once
    torch.testing.assert_close(out, right, rtol=0, atol=2e-5)


def allowed(mask: BlockMask, heads: int) -> Tensor:
    """``[H, N, N]``: what a kernel computes that reads the tables, and asks the rule only in tiles that are not whole."""
    n, tile = mask.seq_lengths[0], mask.BLOCK_SIZE[0]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    found = torch.zeros(heads, n, n, dtype=torch.bool)
    for head in range(heads):
        rule = mask.mask_mod(0, head, i, j)  # type: ignore[arg-type]
        for counts, indices, whole in (
            (mask.kv_num_blocks, mask.kv_indices, False),
            (mask.full_kv_num_blocks, mask.full_kv_indices, True),
        ):
            assert counts is not None
            assert indices is not None
            own = min(head, indices.shape[1] - 1)
            for row, count in enumerate(counts[0, own].tolist()):
                for column in indices[0, own, row, :count].tolist():
                    where = (head, slice(row * tile, (row + 1) * tile), slice(column * tile, (column + 1) * tile))
                    assert not found[where].any()  # a tile is listed once
                    found[where] = True if whole else rule[where[1:]]
    return found


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm_flex, "TILE", 16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("n", "sink", "local", "whole"), [(150, 20, 40, 150), (128, 0, 1, 100), (75, 33, 75, 75)])
def test_the_tables_of_a_window_hold_its_pairs(n: int, sink: int, local: int, whole: int) -> None:
    mask = mm_flex.window(n, sink=sink, local=local, whole=whole, device=CPU)
    right = a_shape_visible(torch.arange(n), n, sink=sink, local=local, tail=n - whole)
    assert torch.equal(allowed(mask, 1)[0], right)
    assert mask.full_kv_num_blocks is not None
    assert local < 16 or int(mask.full_kv_num_blocks.sum()) > 0  # the rule is not asked everywhere


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("n", "block"), [(150, 8), (128, 16), (97, 4)])
def test_the_tables_of_an_index_hold_its_pairs(n: int, block: int) -> None:
    generator = torch.Generator().manual_seed(n)
    diagonals = torch.rand(1, 3, -(-n // block), generator=generator) < 0.3
    diagonals[..., 0] = True
    diagonals[:, 0, : 9 * 16 // block] = True  # whole tiles of a head
    columns = torch.stack([torch.randperm(n, generator=generator)[:20].sort().values for _ in range(3)])[None]
    index = Index(columns, diagonals, block, n)
    mask = mm_flex.indexed(index)
    assert torch.equal(allowed(mask, 3), index.visible(torch.arange(n))[0])
    assert mask.full_kv_num_blocks is not None
    assert int(mask.full_kv_num_blocks[0, 0].sum()) > 0


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lines", ["h", "v", "s", "hv", "hvs"])
@pytest.mark.parametrize(("stride", "local", "stop"), [(10, 7, 140), (3, 30, 121), (40, 1, 140), (500, 5, 140)])
def test_window_and_sorted_lines_share_no_pair_and_are_the_grid(lines: str, stride: int, local: int, stop: int) -> None:
    n, start = 150, 12
    flags = {"horizontal": "h" in lines, "vertical": "v" in lines, "slash": "s" in lines}
    grid = Grid(start, local, start, stop, stride, **flags)
    phase = torch.tensor([0, stride - 1, stride // 2])
    at, slots = mm_flex.places(grid, phase), mm_flex.slots_of(grid, phase)
    assert torch.equal(at.gather(1, slots), torch.arange(start, stop).expand(3, -1).int())
    there = allowed(mm_flex.lines(grid, at), 3)
    assert not there[(at < 0)].any()
    assert not there.transpose(1, 2)[(at < 0)].any()  # nobody sees a slot without a token
    back = torch.zeros(3, n, n, dtype=torch.bool)
    for head in range(3):
        back[head, start:stop, start:stop] = there[head][slots[head]][:, slots[head]]
    near = allowed(mm_flex.window(n, sink=start, local=local, whole=stop, device=CPU), 1)
    assert not (near & back).any()
    assert torch.equal(near | back, grid_visible(grid, phase[None], torch.arange(n), n)[0])


def test_a_fresh_index_of_the_same_shape_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt has its own tables and tensors in its rule: compiled anew, each round would take seconds."""
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph

    monkeypatch.setattr(mm_flex, "flex_attention", torch.compile(flex_attention, dynamic=False, backend=backend))
    for seed in range(2):
        method, _, scene, (q, k, v) = asked("pattern=vs,columns=9,slashes=30", seed)
        mm_flex.attention(q, k, v, method.heads(scene, 0, 10), scene)
        assert len(made) == 1


def test_what_it_cannot_compare_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _, scene, (q, k, v) = asked("pattern=grid,boundary=q")
    with pytest.raises(ValueError, match="not kept apart"):
        mm_flex.attention(q, k, v, method.heads(scene, 0, 10), scene)
    method, _, scene, (q, k, v) = asked("pattern=grid")
    monkeypatch.setattr(mm_flex, "EAGER", 100)
    with pytest.raises(ValueError, match="194² scores"):
        mm_flex.attention(q, k, v, method.heads(scene, 0, 10), scene)
