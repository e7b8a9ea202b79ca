"""Layout, cache and patcher on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlmbench.cache import KVLayer
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.live import LiveStorages
from vlmbench.patch import Patcher, fingerprint
from vlmbench.trace import runs


def layout_of(kinds: list[tuple[str, int]]) -> TokenLayout:
    spans, cursor = [], 0
    for frame, (kind, length) in enumerate(kinds):
        spans.append(Span(kind, cursor, cursor + length, 0, frame, (1, length)))  # type: ignore[arg-type]
        cursor += length
    return TokenLayout(tuple(spans))


layouts = st.lists(
    st.tuples(st.sampled_from(["text", "video", "image", "separator"]), st.integers(1, 5)), min_size=1, max_size=12
).map(layout_of)


@given(layouts, st.data())
def test_selecting_keeps_each_tokens_kind(layout: TokenLayout, data: Any) -> None:
    keep = sorted(data.draw(st.sets(st.integers(0, layout.length - 1), min_size=1)))

    def kinds(of: TokenLayout) -> list[tuple[str, int | None]]:
        return [(span.kind, span.frame) for span in of for _ in range(len(span))]

    assert kinds(layout.select(keep)) == [kinds(layout)[i] for i in keep]
    assert layout.select(list(range(layout.length))) == layout


@given(layouts)
def test_units_hold_every_visual_token_once_and_never_the_tail(layout: TokenLayout) -> None:
    visual = [span for span in layout if span.kind in ("video", "image")]
    assert [unit.start for unit in layout.units] == [span.start for span in visual]
    assert all(a.stop == b.start for a, b in zip(layout.units, layout.units[1:], strict=False))
    if visual:
        assert layout.units[-1].stop == visual[-1].stop


def test_text_between_frames_belongs_to_the_frame_before() -> None:
    layout = layout_of([("text", 3), ("video", 2), ("text", 4), ("video", 2), ("text", 5)])
    assert layout.units == ((3, 9), (9, 11))


def test_a_prompt_must_keep_its_last_token_in_order() -> None:
    prompt = Prompt(torch.zeros(1, 4, 2), torch.arange(4)[None], layout_of([("text", 4)]), 4)
    with pytest.raises(ValueError, match="last prompt token"):
        prompt.select(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="sorted"):
        prompt.select(torch.tensor([1, 0, 3]))
    assert prompt.select(torch.tensor([1, 3])).next_position == 4


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(0, 9))
def test_cache_returns_what_was_put_in_whatever_was_reserved(sizes: list[int], headroom: int) -> None:
    layer, pieces = KVLayer(headroom), []
    for seed, n in enumerate(sizes):
        pieces.append(torch.randn(1, 2, n, 3, generator=torch.Generator().manual_seed(seed)))
        keys, values = layer.update(pieces[-1], -pieces[-1])
    assert torch.equal(keys, torch.cat(pieces, dim=2))
    assert torch.equal(values, -keys)
    assert layer.get_seq_length() == sum(sizes)
    assert layer.get_mask_sizes(1) == (sum(sizes) + 1, 0)
    assert layer.used_bytes == 2 * 2 * 3 * 4 * sum(sizes) <= layer.reserved_bytes


def test_evicted_tokens_count_as_seen_but_not_as_held() -> None:
    layer = KVLayer(4)
    layer.evicted = 10
    layer.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    assert layer.get_seq_length() == 13
    assert layer.get_mask_sizes(1) == (4, 0)


def test_decode_steps_within_the_headroom_move_no_key() -> None:
    layer = KVLayer(5)
    keys, _ = layer.update(torch.zeros(1, 1, 7, 2), torch.zeros(1, 1, 7, 2))
    for _ in range(5):
        grown, _ = layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
        assert grown.data_ptr() == keys.data_ptr()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)


def test_changes_are_undone_in_reverse_order_to_what_was_there() -> None:
    toy = Toy()
    toy.mark = "first"  # type: ignore[assignment]
    before = fingerprint(toy)
    with Patcher(None) as patch:  # type: ignore[arg-type]
        patch.attr(toy, "mark", "second")
        patch.attr(toy, "mark", "third")
        patch.attr(toy, "other", 1)
        patch.forward(toy.part, lambda x: x)
        patch.pre(toy.part, lambda module, args, kwargs: None)
        assert fingerprint(toy) != before
    assert toy.mark == "first"
    assert not hasattr(toy, "other")
    assert fingerprint(toy) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda toy: toy.part.weight.data.add_(1e-3),
        lambda toy: toy.part.register_forward_hook(lambda *_: None),
        lambda toy: setattr(toy.part, "forward", lambda x: x),
        lambda toy: setattr(toy, "left_behind", 1),
    ],
    ids=["weight", "hook", "forward", "attribute"],
)
def test_fingerprint_sees(change: Any) -> None:
    toy = Toy()
    before = fingerprint(toy)
    with torch.no_grad():
        change(toy)
    assert fingerprint(toy) != before


def test_live_storages_count_each_storage_once_until_it_is_freed() -> None:
    weight = torch.zeros(100)
    with LiveStorages([weight]) as live:
        assert live.current == 400
        view = weight[:50]  # no new storage
        assert live.current == 400
        a = torch.zeros(1000)
        b = a.reshape(10, 100)
        assert live.current == 4400
        del a
        assert live.current == 4400  # b still holds it
        del b
        assert live.current == 400
        torch.zeros(500) + 1  # two temporaries
        assert live.current == 400
        assert live.peak >= 4400
        live.restart_peak()
        assert live.peak == 400
        assert view.numel() == 50


def test_runs_are_short_and_lossless() -> None:
    indices = [0, 1, 2, 5, 7, 8]
    assert runs(indices) == [[0, 3], [5, 1], [7, 2]]
    assert [i for start, n in runs(indices) for i in range(start, start + n)] == indices
