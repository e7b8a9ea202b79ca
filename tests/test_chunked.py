"""A long video in pieces is the same video: norms, MLPs and towers where tokens do not meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmbench import chunked
from vlmbench.madeup import Shape, embedded
from vlmbench.patch import Patcher, fingerprint


@pytest.fixture
def short(monkeypatch: Any) -> None:
    monkeypatch.setattr(chunked, "LONG", 60)
    monkeypatch.setattr(chunked, "ROWS", 17)
    monkeypatch.setattr(chunked, "PATCHES", 40)


@torch.inference_mode()
def prefilled(adapter: Any) -> tuple[Any, Any]:
    cache = adapter.new_cache(0)
    logits = adapter.prefill(embedded(adapter, Shape(3, 4, 4, 2, 16)), cache)
    return logits, [layer.keys for layer in cache.layers]


def test_prefill_in_pieces_is_prefill(adapter: Any, short: None, monkeypatch: Any) -> None:
    ours, keys = prefilled(adapter)
    monkeypatch.setattr(chunked, "LONG", 10**9)
    whole, right = prefilled(adapter)
    # The same float32 sums; a matrix product of fewer rows may add in another order, and four layers follow.
    for mine, theirs in zip((ours, *keys), (whole, *right), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_pieces_bound_what_an_mlp_sees_and_leave_no_trace(adapter: Any, short: None, monkeypatch: Any) -> None:
    before = fingerprint(adapter.model)
    mlp, seen = type(adapter.layers[0].mlp), []
    stock = mlp.forward

    def forward(self: Any, hidden: Any) -> Any:
        seen.append(hidden.shape[1])
        return stock(self, hidden)

    monkeypatch.setattr(mlp, "forward", forward)
    prefilled(adapter)
    assert max(seen) == 17
    assert sum(seen) == 4 * (14 + 12 + 60)
    assert fingerprint(adapter.model) == before


def test_what_a_method_replaces_or_watches_stays_whole(adapter: Any, short: None) -> None:
    seen = []
    with Patcher(adapter) as patch:
        stock = adapter.layers[0].mlp.forward

        def forward(hidden: Any) -> Any:
            seen.append(hidden.shape[1])
            return stock(hidden)

        patch.forward(adapter.layers[0].mlp, forward)
        patch.pre(adapter.layers[1].mlp.down_proj, lambda module, args, kwargs: seen.append(args[0].shape[1]))
        prefilled(adapter)
        assert adapter.layers[0].mlp.forward is forward
    assert seen == [14 + 12 + 60] * 2


def test_training_sees_no_pieces(adapter: Any, short: None) -> None:
    with chunked.in_pieces(adapter, 10**6):
        assert "forward" not in vars(adapter.layers[0].mlp)


def test_a_tower_in_pieces_is_the_tower(adapter: Any, clip: Callable[..., Any], short: None, monkeypatch: Any) -> None:
    with torch.inference_mode():
        inputs = adapter.inputs([clip(10), clip(4)], "")
        ours = adapter.encode_vision(inputs).video
        monkeypatch.setattr(chunked, "PATCHES", 10**9)
        # float32 sums in another order, in two blocks.
        torch.testing.assert_close(ours, adapter.encode_vision(inputs).video, rtol=0, atol=1e-5)


def test_pieces_are_whole_units_in_order() -> None:
    pixels, grid = torch.arange(5 * 24 + 2 * 150)[:, None], torch.tensor([[5, 4, 6], [2, 10, 15]])
    found = list(chunked.pieces_of([], pixels, grid))
    assert len(found) == 1
    before, chunked.PATCHES = chunked.PATCHES, 50
    try:
        found = list(chunked.pieces_of([], pixels, grid))
        block = torch.nn.Linear(1, 1)
        block.register_forward_pre_hook(lambda *_: None)
        assert len(list(chunked.pieces_of([block], pixels, grid))) == 1
    finally:
        chunked.PATCHES = before
    assert torch.equal(torch.cat([each for each, _ in found]), pixels)
    assert [piece.tolist()[0] for _, piece in found] == [[2, 4, 6], [2, 4, 6], [1, 4, 6], [1, 10, 15], [1, 10, 15]]
