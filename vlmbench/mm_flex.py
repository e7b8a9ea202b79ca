"""MMInference's patterns through FlexAttention: the library that our kernels are held against (`bench attention --rivals`).

The index is ours (`mm_attention.Group`). What is made of it here is what the library asks for: a table of 128 × 128 tiles and
the rule inside them. Windows and vertical-slash heads run in the prompt's own order. Of a grid head, sink, window and the rows
that see everything run so too; its lines run on queries and keys that are sorted by their place in the line's stride, a head's
own phase first. There a vertical line is a run of keys, a horizontal one a run of rows and diagonals are squares; both parts
are joined by log-sum-exp. Compiled on CUDA; elsewhere eager, which computes every pair and is for tests on small shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from vlmbench.kernels.calls import LAST, Attended, Tally, join_into, last_weights
from vlmbench.kernels.grid import Grid
from vlmbench.kernels.last_queries import Sums, fused, sums
from vlmbench.kernels.vertical_slash import Index
from vlmbench.mm_attention import Group, Layer, Part
from vlmbench.mm_patterns import Head, Scene

TILE = 128
EAGER = 2**12
"""Tokens above which the eager way, which writes every score down, is refused."""
FAR = 2**29
"""A place that no token has; sums of two stay in 32 bits."""
Rule = Callable[[Any, Any, Any, Any], Any]


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Sequence[Head], scene: Scene, *, scale: float | None = None
) -> Tensor:
    """``q [1, H, N, D]``, ``k, v [1, Hkv, N, D]``, a pattern for each of the H heads; returns ``[1, H, N, D]``.

    Raises `ValueError` for several prompts, for Q- and 2D-boundary, and for a prompt that only a compiler could take.
    """
    if len(q) > 1 or any(head.inter not in ("none", "k") for head in heads):
        raise ValueError("FlexAttention is compared on one prompt whose modalities are not kept apart")
    if not q.is_cuda and q.shape[2] > EAGER:
        raise ValueError(f"without CUDA FlexAttention writes {q.shape[2]}² scores for each head; {EAGER}² are the most")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups: dict[Head, list[int]] = {}
    for number, head in enumerate(heads):
        groups.setdefault(head, []).append(number)
    shared, out = q.shape[1] // k.shape[1], None
    for head, numbers in groups.items():
        which = torch.tensor(numbers, device=q.device)
        whole = len(numbers) == q.shape[1]
        rows = q if whole else q[:, which]
        keys, values = (x if whole else x[:, which // shared] for x in (k, v))
        found = _attend(Group(head, which, scene, scale, Layer(), False), rows, keys, values)
        if whole:
            return found
        if out is None:
            out = torch.empty_like(q)
        out[:, which] = found
    return out if out is not None else torch.empty_like(q)


def _attend(group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    intra, n, scale = group.head.vision, q.shape[2], group.scale
    part = Part(*group.scene.vision, n, LAST)
    if intra.kind == "dense":
        return _flex(q, k, v, window(n, sink=0, local=n, whole=n, device=q.device), scale)
    if intra.kind in ("a_shape", "tri"):
        whole = part.stop if intra.kind == "tri" else n
        mask = window(n, sink=intra.sink, local=intra.local, whole=whole, device=q.device)
        return _flex(q, k, v, mask, scale)
    seen = _seen(q[:, :, -LAST:], k, scale, needed=intra.online, diagonals=intra.kind == "vs")
    if intra.kind == "vs":
        return _flex(q, k, v, indexed(group.index(seen, intra, n)), scale)
    start, stop, stride, phase = group.lines(seen.columns / min(LAST, n), intra, part, n)
    # Rows from `stop` on see everything, as if lines ended there.
    found = _with_lse(q, k, v, window(n, sink=start, local=intra.local, whole=stop, device=q.device), scale)
    flags = {"horizontal": intra.horizontal, "vertical": intra.vertical, "slash": intra.slash}
    if stop > start and any(flags.values()):
        for each in stride[0].unique().tolist():
            which = (stride[0] == each).nonzero()[:, 0]
            grid = Grid(start, intra.local, start, stop, int(each), **flags)
            _join_lines(found, q, k, v, grid, which, phase[0, which], scale)
    return found.out


def _seen(q: Tensor, k: Tensor, scale: float, *, needed: bool, diagonals: bool) -> Sums:
    """What the last queries ``[1, h, L, D]`` attend to, by the kernel that ours asks too."""
    if not needed:
        return Sums(*(q.new_empty(*q.shape[:2], 0) for _ in range(2)))
    if not q.is_cuda:
        return sums(last_weights(q, k, scale=scale, tally=Tally()))
    every = torch.arange(q.shape[1], device=q.device)
    return fused.sums(q, k, every, fused.log_sum_exp(q, k, every, scale=scale), diagonals=diagonals, scale=scale)


def _join_lines(
    found: Attended, q: Tensor, k: Tensor, v: Tensor, grid: Grid, which: Tensor, phase: Tensor, scale: float
) -> None:
    """Add the lines of the heads `which` ``[h]``, all of one stride, to what they have seen already."""
    at = places(grid, phase)  # [h, slots]
    rows = at.clamp(min=0).long()
    shared = q.shape[1] // k.shape[1]
    sorted_q = q[0, which[:, None], rows][None]  # [1, h, slots, D]
    sorted_k, sorted_v = (x[0, (which // shared)[:, None], rows][None] for x in (k, v))
    lined = _with_lse(sorted_q, sorted_k, sorted_v, lines(grid, at), scale)
    slots = slots_of(grid, phase)  # [h, tokens]
    number = torch.arange(len(which), device=q.device)[:, None]
    there = Attended(lined.out[0, number, slots], lined.lse[0, number, slots])
    heads = slice(None) if len(which) == q.shape[1] else which  # of all of them no copy is made
    inside = slice(grid.start, grid.stop)
    out, lse = found.out[0, heads, inside], found.lse[0, heads, inside]
    join_into(out, (out, lse), there)
    if heads is which:
        found.out[0, heads, inside] = out


# -- tables and rules -------------------------------------------------------------------------------------------------------


def window(n: int, *, sink: int, local: int, whole: int, device: torch.device) -> BlockMask:
    """Of all heads: the first `sink` keys, the last `local` ones, and for rows from `whole` on every key before them."""

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((j < sink) | (i - j < local) | (i >= whole))

    low = torch.arange(0, n, TILE, device=device)
    high = (low + TILE).clamp(max=n) - 1
    a, b, c, d = low[:, None], high[:, None], low, high  # first and last row, first and last key
    some = (c <= b) & ((c < sink) | (a - d < local) | (b >= whole))
    all_of_it = (d <= a) & ((d < sink) | (b - c < local) | (a >= whole)) & (low + TILE <= n)
    return _mask(some[None], all_of_it[None], n, rule)


def indexed(index: Index) -> BlockMask:
    """Of each head: its block diagonals and its columns (`Index.visible`)."""
    n, block, device = index.length, index.block, index.columns.device
    tiles, fine = -(-n // TILE), TILE // block
    diagonals = index.diagonals[0].clone()  # [H, R]
    diagonals[:, 0] = True
    diagonals = functional.pad(diagonals, (0, (tiles + 1) * fine - diagonals.shape[1]))
    column = torch.zeros(len(diagonals), tiles * TILE, dtype=torch.bool, device=device)
    column.scatter_(1, index.columns[0].clamp(0, n - 1), True)

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (column[h, j] | diagonals[h, (i // block - j // block).clamp(min=0)])

    # Block diagonals that meet in a tile so many tiles before a row's own: 2 · fine - 1 of them.
    near = functional.pad(diagonals, (fine - 1, 0)).unfold(1, 2 * fine - 1, fine)[:, :tiles]  # [H, tiles, …]
    number = torch.arange(tiles, device=device)
    apart = number[:, None] - number
    back = apart.clamp(min=0)
    held = column.view(len(column), tiles, TILE)
    some = (apart >= 0) & (near.any(-1)[:, back] | held.any(-1)[:, None])
    all_of_it = (apart > 0) & (near.all(-1)[:, back] | held.all(-1)[:, None]) & ((number + 1) * TILE <= n)
    return _mask(some, all_of_it, n, rule)


def lines(grid: Grid, at: Tensor) -> BlockMask:
    """Of each head: what lines add to sink and window, between the sorted tokens `at` ``[h, slots]`` (`places`)."""
    heads, n = at.shape
    periods, local = n // grid.stride, grid.local
    at = functional.pad(at, (0, -n % TILE), value=-FAR)
    horizontal, vertical, slash = grid.horizontal, grid.vertical, grid.slash

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        far = (at[h, i] - at[h, j] >= local) & (at[h, j] >= 0)
        line = j < 0
        if horizontal:  # what is not there is not compiled
            line = line | (i < periods)
        if vertical:
            line = line | (j < periods)
        if slash:
            line = line | (i // periods == j // periods)
        return line & far

    tiled = at.view(heads, -1, TILE)
    there = tiled >= 0
    high, low = tiled.amax(-1), torch.where(there, tiled, FAR).amin(-1)  # [h, tiles]
    first = torch.arange(0, n, TILE, device=at.device)
    a, b = first // periods, (first + TILE - 1) // periods  # residues of a tile, counted from the line's own
    crossed = (horizontal & (a == 0))[:, None] | (vertical & (a == 0)) | (slash & (a[:, None] <= b) & (a <= b[:, None]))
    alone = a == b
    same = (a[:, None] == a) & alone[:, None] & alone
    inside = (horizontal & (b == 0))[:, None] | (vertical & (b == 0)) | (slash & same)
    full = there.all(-1)
    some = crossed & (high[:, :, None] - low[:, None] >= local)
    all_of_it = inside & (low[:, :, None] - high[:, None] >= local) & full[:, :, None] & full[:, None]
    return _mask(some, all_of_it, n, rule)


def places(grid: Grid, phase: Tensor) -> Tensor:
    """int32 ``[h, slots]``: the token at each slot, sorted by its place in the stride, that of `phase` ``[h]`` first.

    Every place has as many slots as the most tokens of one; where there is no token it is `-FAR`.
    """
    span, stride = grid.stop - grid.start, grid.stride
    first = (phase[:, None] + torch.arange(stride, device=phase.device)) % stride  # [h, stride]
    found = first[..., None] + torch.arange(-(-span // stride), device=phase.device) * stride
    return torch.where(found < span, found + grid.start, -FAR).flatten(1).int()


def slots_of(grid: Grid, phase: Tensor) -> Tensor:
    """int64 ``[h, tokens]``: where `places` has put each token from ``grid.start`` on."""
    span, stride = grid.stop - grid.start, grid.stride
    x = torch.arange(span, device=phase.device)
    return (x - phase[:, None]) % stride * -(-span // stride) + x // stride


def _mask(some: Tensor, whole: Tensor, n: int, rule: Rule) -> BlockMask:
    """From tables ``[H or 1, tiles, tiles]``: tiles that hold an allowed pair, and those that hold no other."""
    options: dict[str, Any] = {"BLOCK_SIZE": TILE, "mask_mod": rule, "seq_lengths": (n, n)}
    if "compute_q_blocks" in signature(BlockMask.from_kv_blocks).parameters:
        options["compute_q_blocks"] = False  # of use to gradients alone
    return BlockMask.from_kv_blocks(*_listed(some & ~whole), *_listed(some & whole), **options)


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and which, those set first: int32 ``[1, H, tiles]`` and ``[1, H, tiles, tiles]``."""
    order = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    attend = _compiled() if q.is_cuda else flex_attention
    out: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


def _with_lse(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Attended:
    """And its log-sum-exp; a row that sees nothing is zeros and -inf."""
    attend = _compiled() if q.is_cuda else flex_attention
    options = {"enable_gqa": q.shape[1] != k.shape[1], "return_aux": AuxRequest(lse=True)}
    out, aux = attend(q, k, v, block_mask=mask, scale=scale, **options)
    return Attended(out, aux.lse)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
