"""Families: our loop equals the library's, inputs are the real processors', and a user's folder loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.conftest import for_generate
from vlmbench.cache import cache_bytes
from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.layout import Span, TokenLayout
from vlmbench.methods.full import Full
from vlmbench.models.base import Features
from vlmbench.models.catalogue import PRESETS
from vlmbench.models.loading import load
from vlmbench.models.qwen_vl import QwenVL, mrope_positions
from vlmbench.trace import Trace

QUESTION = "where is the red circle ?"
MEDIA = {
    "video": ["video"],
    "image": ["image"],
    "two videos": ["video", "video"],
    "both": ["image", "video"],
    "text": [],
}


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest, adapter: Any) -> Any:
    with adapter.attention(request.param):
        yield request.param


@pytest.mark.parametrize("media", MEDIA.values(), ids=MEDIA)
def test_greedy_tokens_equal_generate(adapter: Any, clip: Any, attention: str, media: list[str]) -> None:
    clips = [clip(1, "image") if kind == "image" else clip(6) for kind in media]
    done = generate(adapter, Full(), Trace(), clips, QUESTION, max_new_tokens=8, stop_at_eos=False)
    inputs = adapter.to_device(adapter.inputs(clips, QUESTION))
    stock = for_generate(inputs)
    theirs = adapter.model.generate(**stock, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    assert done.token_ids == theirs[0, inputs["input_ids"].shape[1] :].tolist()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TokenLayout, list[float]]:
    """Text, pictures and videos in any order, and the time steps of the videos."""
    spans: list[Span] = []
    steps: list[float] = []
    for media, kind in enumerate(draw(st.lists(st.sampled_from(["text", "image", "video"]), min_size=1, max_size=5))):
        start = spans[-1].stop if spans else 0
        if kind == "text":
            spans.append(Span("text", start, start + draw(st.integers(1, 4))))
            continue
        rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        units = draw(st.integers(1, 9)) if kind == "video" else 1
        if kind == "video":
            steps.append(draw(st.sampled_from([0.5, 1.0, 1.5, 2.0])))
        for unit in range(units):
            first = start + unit * rows * columns
            spans.append(Span(kind, first, first + rows * columns, media, unit, (rows, columns)))  # type: ignore[arg-type]
    return TokenLayout(tuple(spans)), steps


@given(layouts())
def test_rope_positions_are_those_that_the_qwen_papers_define(case: tuple[TokenLayout, list[float]]) -> None:
    """Token by token: text counts on; a medium counts time, rows and columns from one above all before it."""
    layout, steps = case
    expected: list[tuple[int, int, int]] = []
    remaining = list(steps)
    begin, step, media = 0, 1.0, None
    for span in layout.spans:
        for index in range(len(span)):
            above = max(max(each) for each in expected) + 1 if expected else 0
            if span.kind == "text":
                expected.append((above, above, above))
                media = None
                continue
            if span.media != media:
                begin, media = above, span.media
                step = remaining.pop(0) if span.kind == "video" else 1.0
            assert span.grid is not None
            assert span.frame is not None
            row, column = divmod(index, span.grid[1])
            expected.append((begin + int(span.frame * step), begin + row, begin + column))
    assert mrope_positions(layout, steps).T.tolist() == [list(each) for each in expected]


def test_rope_positions_equal_the_stock_ones_where_those_count_every_axis(adapter: Any, clip: Any) -> None:
    if not isinstance(adapter, QwenVL):
        pytest.skip("one-dimensional positions")
    inputs = adapter.inputs([clip(1, "image"), clip(2)], QUESTION)  # no video longer than its frames are high
    ids = inputs["input_ids"]
    kinds = (ids == adapter.config.image_token_id).int() + 2 * (ids == adapter.config.video_token_id).int()
    grids = {key: inputs[key] for key in ("image_grid_thw", "video_grid_thw")}
    stock, _ = adapter.model.model.get_rope_index(ids, kinds, **grids)
    assert torch.equal(adapter.splice(inputs, Features()).positions, stock)


def test_sdpa_and_eager_agree(adapter: Any, clip: Any) -> None:
    logits = []
    for name in ("sdpa", "eager"):
        with adapter.attention(name):
            logits.append(generate(adapter, Full(), Trace(), [clip(6)], QUESTION, max_new_tokens=1).first_logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)  # float32 rounding over four layers
    assert adapter.attention_names() == ("sdpa", "sdpa")


def test_generation_stops_at_the_end_token_and_leaves_it_out(adapter: Any, clip: Any, monkeypatch: Any) -> None:
    free = generate(adapter, Full(), Trace(), [clip(6)], QUESTION, max_new_tokens=6, stop_at_eos=False).token_ids
    stop = free[3]
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset({stop}))
    done = generate(adapter, Full(), Trace(), [clip(6)], QUESTION, max_new_tokens=6)
    assert done.token_ids == free[: free.index(stop)]


def test_layout_spans_are_the_placeholders(adapter: Any, clip: Any) -> None:
    inputs = adapter.inputs([clip(4), clip(1, "image"), clip(6)], QUESTION)
    with torch.inference_mode():
        layout = adapter.splice(adapter.to_device(inputs), adapter.encode_vision(adapter.to_device(inputs))).layout
    ids = inputs["input_ids"][0]
    placeholders = torch.isin(ids, torch.tensor(adapter.placeholder_ids))
    assert layout.length == len(ids)
    assert [span.start for span in layout][1:] == [span.stop for span in layout][:-1]
    marked = torch.zeros(len(ids), dtype=torch.bool)
    for span in layout:
        marked[span.start : span.stop] = span.kind != "text"
    assert torch.equal(marked, placeholders)
    assert [span.media for span in layout if span.kind == "image"] == [1]
    frames = [span.frame for span in layout if span.kind == "video" and span.media == 2]
    assert frames == list(range(len(frames)))


def test_batched_tower_equals_the_stock_loop(clip: Any) -> None:
    for name in ("mini-qwen2-vl@random", "mini-qwen2.5-vl@random"):
        ours = load(name, dtype=torch.float32, device="cpu", attention="sdpa", max_pixels=112 * 140).adapter
        inputs = ours.inputs([clip(6, side=130), clip(4, side=130)], QUESTION)  # windows of more than one size
        with torch.inference_mode():
            batched = ours.encode_vision(inputs).video
            for block in ours.model.model.visual.blocks:
                del block.attn.forward
            stock = ours.encode_vision(inputs).video
        torch.testing.assert_close(batched, stock, rtol=0, atol=1e-6)  # one float32 rounding, at values near one


def test_cache_holds_exactly_the_prompt_and_the_answer(adapter: Any, clip: Any) -> None:
    done = generate(adapter, Full(), Trace(), [clip(6)], QUESTION, max_new_tokens=5, stop_at_eos=False)
    shapes = adapter.shapes
    per_token = 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * 4
    assert cache_bytes(done.cache) == (per_token * (done.prompt.length + 4), per_token * (done.prompt.length + 5))


def save_folder(adapter: Any, folder: Path) -> Path:
    """A checkpoint as a user has it: sharded safetensors, processor and tokenizer files."""
    adapter.model.save_pretrained(folder, max_shard_size="100KB")
    adapter.processor.save_pretrained(folder)
    return folder


def test_a_users_folder_loads_and_answers_the_same(adapter: Any, clip: Any, tmp_path: Path) -> None:
    folder = save_folder(adapter, tmp_path / "model")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").exists()
    loaded = load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa")
    args: dict[str, Any] = {"max_new_tokens": 6, "stop_at_eos": False}
    ours = generate(adapter, Full(), Trace(), [clip(6)], QUESTION, **args)
    theirs = generate(loaded.adapter, Full(), Trace(), [clip(6)], QUESTION, **args)
    # Weights mapped from a file are aligned otherwise, and the matmul kernel's order of sums goes by alignment.
    torch.testing.assert_close(ours.first_logits, theirs.first_logits, rtol=0, atol=1e-5)
    assert ours.token_ids == theirs.token_ids
    assert load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa").weights_hash == loaded.weights_hash


def test_changed_weights_change_the_hash(adapter: Any, tmp_path: Path) -> None:
    from vlmbench.models.loading import folder_hash

    folder = save_folder(adapter, tmp_path / "model")
    before = folder_hash(folder)
    shard = min(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert folder_hash(folder) != before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny-lava-ov", "No model is called"),
        ("mini-llava-ov:layers=2", "Did you mean 'mini-llava-ov@random:layers=2'"),
        ("qwen3.5-vl-7b@random", "No preset is called"),
        ("mini-llava-ov@random:layers=0", "n at least 1"),
        ("Qwen/Not-Here-7B", "not on this machine"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_sentence(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(name, dtype=torch.float32, device="cpu", attention="sdpa", offline=True)


def test_pickled_weights_and_foreign_families_are_refused(adapter: Any, tmp_path: Path) -> None:
    folder = save_folder(adapter, tmp_path / "model")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save(adapter.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="does not load as a checkpoint"):
        load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    with pytest.raises(UsageError, match=r"not supported|does not load"):
        load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa")


def test_pixel_budget_is_refused_where_it_does_nothing() -> None:
    with pytest.raises(UsageError, match="one input size"):
        load("mini-llava-ov@random", dtype=torch.float32, device="cpu", attention="sdpa", max_pixels=10_000)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("qwen2.5-vl-7b", 8.29e9),
        ("qwen2.5-vl-3b", 3.75e9),
        ("qwen2-vl-7b", 8.29e9),
        ("qwen2-vl-2b", 2.21e9),
        ("llava-ov-7b", 8.03e9),
        ("llava-ov-0.5b", 0.89e9),
        ("llava-1.5-7b", 7.06e9),
        ("llava-next-video-7b", 7.06e9),
        ("llava-video-7b", 8.03e9),
        ("blip-vqa-base", 0.361e9),
        ("blip-captioning-base", 0.224e9),
        ("blip-itm-base", 0.224e9),
        ("longvila-7b", 8.03e9),
    ],
)
def test_presets_have_the_published_size(preset: str, parameters: float) -> None:
    from vlmbench.models.presets import build

    assert preset in PRESETS
    model, _ = build(preset, layers=None, seed=0, dtype=torch.bfloat16, device="meta")
    unique = {id(p): p.numel() for p in model.parameters()}
    # The published checkpoints are rounded to two digits in their cards; 3B and 2B tie their embeddings there.
    print(preset, sum(unique.values()))
    assert sum(unique.values()) == pytest.approx(parameters, rel=0.02)


def test_positions_do_not_depend_on_the_weights_precision(clip: Any) -> None:
    """Seconds a frame stay float32: in bfloat16 they would round the temporal positions of a long video."""
    positions = []
    long = replace(clip(64), fps=29.97)
    for dtype in (torch.float32, torch.bfloat16):
        adapter = load("mini-qwen2.5-vl@random", dtype=dtype, device="cpu", attention="sdpa").adapter
        inputs = adapter.to_device(adapter.inputs([long], QUESTION))
        assert inputs["pixel_values_videos"].dtype == dtype
        positions.append(adapter.splice(inputs, Features()).positions)
    assert torch.equal(*positions)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(adapter: Any, tmp_path: Path) -> None:
    """The library would fill it with random numbers and go on."""
    folder = tmp_path / "model"
    adapter.processor.save_pretrained(folder)
    adapter.model.config.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    del tensors[next(name for name in tensors if "q_proj.weight" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lacks the weights of 1 tensors"):
        load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa")
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="does not load"):
        load(str(folder), dtype=torch.float32, device="cpu", attention="sdpa")
